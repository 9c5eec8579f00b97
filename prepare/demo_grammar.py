"""The demo's language: a grammar that speaks English, German, Italian and Chinese at once.

example(rng) draws one of eight sentence shapes and fills it from the word tables below. Every text is a tuple of four
strings in the order of LANGUAGES. Beside the sentence come its facts, questions with their answers, and its traps,
questions that the sentence does not answer.
"""

import zlib

from prepare import instructions

LANGUAGES = ("en", "de", "it", "zh")
REFUSALS = tuple(instructions.REFUSALS[language] for language in LANGUAGES)

# ----------------------------------------------------------------------------------------------------------------------
# Words. A quadruple is (English, German, Italian, Chinese); m, f, n are German genders, m, f Italian ones

NAMES = [(n, n, n, zh) for n, zh in (
    ("Anna", "安娜"), ("Maria", "玛丽亚"), ("Laura", "劳拉"), ("Emma", "艾玛"), ("Julia", "朱莉娅"), ("Sara", "萨拉"),
    ("Paul", "保罗"), ("Peter", "彼得"), ("Marco", "马可"), ("Thomas", "托马斯"), ("David", "大卫"), ("Martin", "马丁"))]
FEMALE = {"Anna", "Maria", "Laura", "Emma", "Julia", "Sara"}

# English, German man, German woman, Italian man, Italian woman, Chinese, gender of the one in the sentences
PEOPLE = [
    ("doctor", "Arzt", "Ärztin", "medico", "dottoressa", "医生", "m"),
    ("teacher", "Lehrer", "Lehrerin", "maestro", "maestra", "老师", "f"),
    ("nurse", "Krankenpfleger", "Krankenschwester", "infermiere", "infermiera", "护士", "f"),
    ("baker", "Bäcker", "Bäckerin", "fornaio", "fornaia", "面包师", "m"),
    ("gardener", "Gärtner", "Gärtnerin", "giardiniere", "giardiniera", "园丁", "m"),
    ("cook", "Koch", "Köchin", "cuoco", "cuoca", "厨师", "m"),
    ("singer", "Sänger", "Sängerin", "cantante", "cantante", "歌手", "f"),
    ("writer", "Schriftsteller", "Schriftstellerin", "scrittore", "scrittrice", "作家", "m"),
    ("driver", "Fahrer", "Fahrerin", "autista", "autista", "司机", "m"),
    ("student", "Student", "Studentin", "studente", "studentessa", "学生", "f"),
    ("engineer", "Ingenieur", "Ingenieurin", "ingegnere", "ingegnere", "工程师", "m"),
    ("painter", "Maler", "Malerin", "pittore", "pittrice", "画家", "f"),
    ("dentist", "Zahnarzt", "Zahnärztin", "dentista", "dentista", "牙医", "m"),
]
RELATIVES = [  # English, German, German gender, Italian, Chinese
    ("mother", "Mutter", "f", "madre", "妈妈"), ("father", "Vater", "m", "padre", "爸爸"),
    ("brother", "Bruder", "m", "fratello", "哥哥"), ("sister", "Schwester", "f", "sorella", "姐姐"),
    ("grandmother", "Großmutter", "f", "nonna", "奶奶"), ("grandfather", "Großvater", "m", "nonno", "爷爷"),
    ("uncle", "Onkel", "m", "zio", "叔叔"), ("aunt", "Tante", "f", "zia", "阿姨"),
    ("son", "Sohn", "m", "figlio", "儿子"), ("daughter", "Tochter", "f", "figlia", "女儿"),
]
# nouns: English, its plural, German, its gender, its plural, Italian, its gender, its plural, Chinese, measure word
OBJECTS = [
    ("apple", "apples", "Apfel", "m", "Äpfel", "mela", "f", "mele", "苹果", "个"),
    ("book", "books", "Buch", "n", "Bücher", "libro", "m", "libri", "书", "本"),
    ("cup", "cups", "Tasse", "f", "Tassen", "tazza", "f", "tazze", "杯子", "个"),
    ("hat", "hats", "Hut", "m", "Hüte", "cappello", "m", "cappelli", "帽子", "顶"),
    ("bag", "bags", "Tasche", "f", "Taschen", "borsa", "f", "borse", "包", "个"),
    ("chair", "chairs", "Stuhl", "m", "Stühle", "sedia", "f", "sedie", "椅子", "把"),
    ("lamp", "lamps", "Lampe", "f", "Lampen", "lampada", "f", "lampade", "灯", "盏"),
    ("flower", "flowers", "Blume", "f", "Blumen", "fiore", "m", "fiori", "花", "朵"),
    ("shirt", "shirts", "Hemd", "n", "Hemden", "camicia", "f", "camicie", "衬衫", "件"),
    ("coat", "coats", "Mantel", "m", "Mäntel", "cappotto", "m", "cappotti", "大衣", "件"),
    ("key", "keys", "Schlüssel", "m", "Schlüssel", "chiave", "f", "chiavi", "钥匙", "把"),
    ("ball", "balls", "Ball", "m", "Bälle", "palla", "f", "palle", "球", "个"),
    ("box", "boxes", "Kiste", "f", "Kisten", "scatola", "f", "scatole", "盒子", "个"),
    ("bottle", "bottles", "Flasche", "f", "Flaschen", "bottiglia", "f", "bottiglie", "瓶子", "个"),
    ("umbrella", "umbrellas", "Regenschirm", "m", "Regenschirme", "ombrello", "m", "ombrelli", "雨伞", "把"),
    ("bicycle", "bicycles", "Fahrrad", "n", "Fahrräder", "bicicletta", "f", "biciclette", "自行车", "辆"),
    ("picture", "pictures", "Bild", "n", "Bilder", "quadro", "m", "quadri", "画", "幅"),
    ("pencil", "pencils", "Bleistift", "m", "Bleistifte", "matita", "f", "matite", "铅笔", "支"),
    ("plate", "plates", "Teller", "m", "Teller", "piatto", "m", "piatti", "盘子", "个"),
    ("knife", "knives", "Messer", "n", "Messer", "coltello", "m", "coltelli", "刀", "把"),
    ("dress", "dresses", "Kleid", "n", "Kleider", "vestito", "m", "vestiti", "连衣裙", "条"),
    ("scarf", "scarves", "Schal", "m", "Schals", "sciarpa", "f", "sciarpe", "围巾", "条"),
    ("mirror", "mirrors", "Spiegel", "m", "Spiegel", "specchio", "m", "specchi", "镜子", "面"),
    ("suitcase", "suitcases", "Koffer", "m", "Koffer", "valigia", "f", "valigie", "行李箱", "个"),
]
ANIMALS = [
    ("dog", "dogs", "Hund", "m", "Hunde", "cane", "m", "cani", "狗", "只"),
    ("cat", "cats", "Katze", "f", "Katzen", "gatto", "m", "gatti", "猫", "只"),
    ("bird", "birds", "Vogel", "m", "Vögel", "uccello", "m", "uccelli", "鸟", "只"),
    ("horse", "horses", "Pferd", "n", "Pferde", "cavallo", "m", "cavalli", "马", "匹"),
    ("mouse", "mice", "Maus", "f", "Mäuse", "topo", "m", "topi", "老鼠", "只"),
    ("duck", "ducks", "Ente", "f", "Enten", "anatra", "f", "anatre", "鸭子", "只"),
]
# adjectives: English, German stem, Italian m, f, m plural, f plural, Chinese before a noun
COLOURS = [
    ("red", "rot", "rosso", "rossa", "rossi", "rosse", "红色的"), ("blue", "blau", "blu", "blu", "blu", "blu", "蓝色的"),
    ("green", "grün", "verde", "verde", "verdi", "verdi", "绿色的"),
    ("black", "schwarz", "nero", "nera", "neri", "nere", "黑色的"),
    ("white", "weiß", "bianco", "bianca", "bianchi", "bianche", "白色的"),
    ("yellow", "gelb", "giallo", "gialla", "gialli", "gialle", "黄色的"),
    ("brown", "braun", "marrone", "marrone", "marroni", "marroni", "棕色的"),
    ("gray", "grau", "grigio", "grigia", "grigi", "grigie", "灰色的"),
]
QUALITIES = [
    ("new", "neu", "nuovo", "nuova", "nuovi", "nuove", "新"),
    ("old", "alt", "vecchio", "vecchia", "vecchi", "vecchie", "旧"),
    ("big", "groß", "grande", "grande", "grandi", "grandi", "大"),
    ("small", "klein", "piccolo", "piccola", "piccoli", "piccole", "小"),
    ("cheap", "billig", "economico", "economica", "economici", "economiche", "便宜的"),
    ("expensive", "teur", "costoso", "costosa", "costosi", "costose", "昂贵的"),
    ("clean", "sauber", "pulito", "pulita", "puliti", "pulite", "干净的"),
    ("heavy", "schwer", "pesante", "pesante", "pesanti", "pesanti", "沉重的"),
]
ANIMAL_QUALITIES = [q for q in QUALITIES if q[0] in ("big", "small")]
CHARACTERS = [  # of people: English, German stem, Italian m, f, Chinese
    ("young", "jung", "giovane", "giovane", "年轻的"), ("old", "alt", "anziano", "anziana", "年老的"),
    ("tall", "groß", "alto", "alta", "高个子"), ("friendly", "freundlich", "gentile", "gentile", "友好的"),
    ("tired", "müd", "stanco", "stanca", "疲惫的"), ("famous", "berühmt", "famoso", "famosa", "著名的"),
    ("happy", "glücklich", "felice", "felice", "快乐的"), ("rich", "reich", "ricco", "ricca", "富有的"),
]
DEEDS = [  # English past and base form, German, Italian participle, Chinese before 了
    ("bought", "buy", "kaufte", "comprato", "买"), ("sold", "sell", "verkaufte", "venduto", "卖"),
    ("found", "find", "fand", "trovato", "找到"), ("lost", "lose", "verlor", "perso", "丢"),
    ("saw", "see", "sah", "visto", "看见"), ("hid", "hide", "versteckte", "nascosto", "藏"),
    ("drew", "draw", "zeichnete", "disegnato", "画"), ("stole", "steal", "stahl", "rubato", "偷"),
]
NUMBERS = [
    ("two", "zwei", "due", "两"), ("three", "drei", "tre", "三"), ("four", "vier", "quattro", "四"),
    ("five", "fünf", "cinque", "五"), ("six", "sechs", "sei", "六"), ("seven", "sieben", "sette", "七"),
    ("eight", "acht", "otto", "八"), ("nine", "neun", "nove", "九"), ("ten", "zehn", "dieci", "十"),
]
PRICES = NUMBERS + [
    ("eleven", "elf", "undici", "十一"), ("twelve", "zwölf", "dodici", "十二"), ("twenty", "zwanzig", "venti", "二十"),
    ("thirty", "dreißig", "trenta", "三十"), ("fifty", "fünfzig", "cinquanta", "五十"),
    ("a hundred", "hundert", "cento", "一百"),
]
PLACES = [
    ("at the market", "auf dem Markt", "al mercato", "在市场"), ("in the garden", "im Garten", "in giardino", "在花园里"),
    ("in the kitchen", "in der Küche", "in cucina", "在厨房里"), ("at the school", "in der Schule", "a scuola", "在学校"),
    ("at the station", "am Bahnhof", "alla stazione", "在车站"), ("in the park", "im Park", "al parco", "在公园里"),
    ("in the library", "in der Bibliothek", "in biblioteca", "在图书馆"),
    ("at the airport", "am Flughafen", "all'aeroporto", "在机场"), ("in the hotel", "im Hotel", "in albergo", "在酒店"),
    ("in the office", "im Büro", "in ufficio", "在办公室"), ("in the museum", "im Museum", "al museo", "在博物馆"),
    ("on the beach", "am Strand", "sulla spiaggia", "在海滩上"), ("in the church", "in der Kirche", "in chiesa", "在教堂里"),
    ("in the village", "im Dorf", "nel villaggio", "在村子里"),
    ("in the hospital", "im Krankenhaus", "in ospedale", "在医院"), ("in the theater", "im Theater", "a teatro", "在剧院"),
]
SHOPS = [p for p in PLACES if p[0].split()[-1] in ("market", "airport", "museum", "hotel", "village")]
SPOTS = [  # inside; the Chinese one follows "在" and a room
    ("on the table", "auf dem Tisch", "sul tavolo", "桌子上"), ("under the bed", "unter dem Bett", "sotto il letto", "床下"),
    ("next to the door", "neben der Tür", "accanto alla porta", "门旁边"),
    ("behind the sofa", "hinter dem Sofa", "dietro il divano", "沙发后面"),
    ("in front of the window", "vor dem Fenster", "davanti alla finestra", "窗户前面"),
    ("on the floor", "auf dem Boden", "sul pavimento", "地板上"),
]
ROOMS = [  # the Chinese one stands alone
    ("in the kitchen", "in der Küche", "in cucina", "厨房"),
    ("in the bedroom", "im Schlafzimmer", "in camera da letto", "卧室"),
    ("in the living room", "im Wohnzimmer", "in soggiorno", "客厅"), ("in the office", "im Büro", "in ufficio", "办公室"),
    ("in the library", "in der Bibliothek", "in biblioteca", "图书馆"), ("in the hotel", "im Hotel", "in albergo", "酒店"),
]
OUTSIDE = [
    ("under the tree", "unter dem Baum", "sotto l'albero", "在树下"),
    ("behind the house", "hinter dem Haus", "dietro la casa", "在房子后面"),
    ("next to the river", "neben dem Fluss", "accanto al fiume", "在河边"),
    ("in the garden", "im Garten", "in giardino", "在花园里"),
    ("in front of the door", "vor der Tür", "davanti alla porta", "在门前"),
    ("in the park", "im Park", "al parco", "在公园里"),
]
HABITS = [
    ("sleeps", "schläft", "dorme", "睡觉"), ("plays", "spielt", "gioca", "玩耍"), ("waits", "wartet", "aspetta", "等待"),
    ("eats", "frisst", "mangia", "吃东西"), ("drinks", "trinkt", "beve", "喝水"),
]
OFTEN = [
    ("every morning", "jeden Morgen", "ogni mattina", "每天早上"), ("every evening", "jeden Abend", "ogni sera", "每天晚上"),
    ("every day", "jeden Tag", "ogni giorno", "每天"), ("on Sundays", "sonntags", "la domenica", "每个星期天"),
]
WEEKDAYS = [
    ("on Monday", "am Montag", "lunedì", "星期一"), ("on Tuesday", "am Dienstag", "martedì", "星期二"),
    ("on Wednesday", "am Mittwoch", "mercoledì", "星期三"), ("on Thursday", "am Donnerstag", "giovedì", "星期四"),
    ("on Friday", "am Freitag", "venerdì", "星期五"), ("on Saturday", "am Samstag", "sabato", "星期六"),
    ("on Sunday", "am Sonntag", "domenica", "星期天"),
]
PAST = WEEKDAYS + [
    ("yesterday", "gestern", "ieri", "昨天"), ("this morning", "heute Morgen", "stamattina", "今天早上"),
    ("last week", "letzte Woche", "la settimana scorsa", "上周"),
    ("last month", "letzten Monat", "il mese scorso", "上个月"),
    ("last year", "letztes Jahr", "l'anno scorso", "去年"),
]
FUTURE = WEEKDAYS + [
    ("tomorrow", "morgen", "domani", "明天"), ("tonight", "heute Abend", "stasera", "今天晚上"),
    ("next week", "nächste Woche", "la settimana prossima", "下周"),
    ("next month", "nächsten Monat", "il mese prossimo", "下个月"),
]
MONTHS = [
    ("in January", "im Januar", "a gennaio", "一月"), ("in February", "im Februar", "a febbraio", "二月"),
    ("in March", "im März", "a marzo", "三月"), ("in April", "im April", "ad aprile", "四月"),
    ("in May", "im Mai", "a maggio", "五月"), ("in June", "im Juni", "a giugno", "六月"),
    ("in July", "im Juli", "a luglio", "七月"), ("in August", "im August", "ad agosto", "八月"),
    ("in September", "im September", "a settembre", "九月"), ("in October", "im Oktober", "a ottobre", "十月"),
    ("in November", "im November", "a novembre", "十一月"), ("in December", "im Dezember", "a dicembre", "十二月"),
]
CITIES = [
    ("Berlin", "Berlin", "Berlino", "柏林"), ("Rome", "Rom", "Roma", "罗马"), ("Paris", "Paris", "Parigi", "巴黎"),
    ("London", "London", "Londra", "伦敦"), ("Vienna", "Wien", "Vienna", "维也纳"), ("Milan", "Mailand", "Milano", "米兰"),
    ("Madrid", "Madrid", "Madrid", "马德里"),
    ("Venice", "Venedig", "Venezia", "威尼斯"), ("Zurich", "Zürich", "Zurigo", "苏黎世"),
    ("Prague", "Prag", "Praga", "布拉格"),
    ("Hamburg", "Hamburg", "Amburgo", "汉堡"), ("Florence", "Florenz", "Firenze", "佛罗伦萨"),
    ("Lisbon", "Lissabon", "Lisbona", "里斯本"),
    ("Athens", "Athen", "Atene", "雅典"), ("Beijing", "Peking", "Pechino", "北京"),
]
TRANSPORT = [
    ("by train", "mit dem Zug", "in treno", "坐火车"), ("by bus", "mit dem Bus", "in autobus", "坐公共汽车"),
    ("by car", "mit dem Auto", "in macchina", "开车"), ("by ship", "mit dem Schiff", "in nave", "坐船"),
    ("by plane", "mit dem Flugzeug", "in aereo", "坐飞机"), ("by motorcycle", "mit dem Motorrad", "in moto", "骑摩托车"),
]
PLANS = [  # infinitives
    ("visit the museum", "das Museum besuchen", "visitare il museo", "参观博物馆"),
    ("play tennis", "Tennis spielen", "giocare a tennis", "打网球"),
    ("play football", "Fußball spielen", "giocare a calcio", "踢足球"),
    ("play chess", "Schach spielen", "giocare a scacchi", "下国际象棋"),
    ("cook soup", "Suppe kochen", "cucinare la zuppa", "煮汤"),
    ("watch a film", "einen Film sehen", "guardare un film", "看电影"),
    ("drink coffee", "Kaffee trinken", "bere il caffè", "喝咖啡"),
    ("eat pizza", "Pizza essen", "mangiare la pizza", "吃比萨饼"),
    ("learn French", "Französisch lernen", "imparare il francese", "学法语"),
    ("listen to music", "Musik hören", "ascoltare la musica", "听音乐"),
    ("go for a walk", "spazieren gehen", "fare una passeggiata", "去散步"),
    ("swim in the lake", "im See schwimmen", "nuotare nel lago", "在湖里游泳"),
    ("sing a song", "ein Lied singen", "cantare una canzone", "唱歌"),
    ("bake a cake", "einen Kuchen backen", "preparare una torta", "烤蛋糕"),
    ("clean the house", "das Haus putzen", "pulire la casa", "打扫房子"),
]
TASTES = [  # English, German, German "no", Italian, Chinese
    ("music", "Musik", "keine", "la musica", "音乐"), ("coffee", "Kaffee", "keinen", "il caffè", "咖啡"),
    ("tea", "Tee", "keinen", "il tè", "茶"), ("chocolate", "Schokolade", "keine", "la cioccolata", "巧克力"),
    ("fish", "Fisch", "keinen", "il pesce", "鱼"), ("bread", "Brot", "kein", "il pane", "面包"),
    ("milk", "Milch", "keine", "il latte", "牛奶"), ("sport", "Sport", "keinen", "lo sport", "运动"),
    ("cheese", "Käse", "keinen", "il formaggio", "奶酪"), ("rice", "Reis", "keinen", "il riso", "米饭"),
]

# ----------------------------------------------------------------------------------------------------------------------
# Grammar


def weak(stem, case, gender, plural=False):
    """A German adjective after der, die, das, in case "nom" or "acc"."""
    return stem + ("en" if plural or (case, gender) == ("acc", "m") else "e")


def the_german(case, gender, plural=False):
    if plural or gender == "f":
        return "die"
    return "das" if gender == "n" else {"nom": "der", "acc": "den"}[case]


def the_italian(noun, gender, plural=False):
    impure = noun[0] == "z" or noun[0] == "s" and noun[1] not in "aeiou" or noun[:2] in ("gn", "ps")
    if noun[0] in "aeiou":
        return ("gli " if gender == "m" else "le ") if plural else "l'"
    if gender == "f":
        return "le " if plural else "la "
    return ("gli " if impure else "i ") if plural else ("lo " if impure else "il ")


def a_italian(noun, gender):
    if gender == "f":
        return "un'" if noun[0] in "aeiou" else "una "
    return "uno " if the_italian(noun, "m") == "lo " else "un "


def the(noun, adjective=None, case="nom", plural=False):
    """The red apple, in four languages; case is that of the German one."""
    en, ens, de, g, des, it, ig, its, zh, _ = noun
    en, de, it = (ens, des, its) if plural else (en, de, it)
    phrase = [f"the {en}", f"{the_german(case, g, plural)} {de}", the_italian(it, ig, plural) + it, zh]
    if adjective:
        phrase = [f"the {adjective[0]} {en}",
                  f"{the_german(case, g, plural)} {weak(adjective[1], case, g, plural)} {de}",
                  f"{the_italian(it, ig, plural)}{it} {italian_form(adjective, ig, plural)}", adjective[-1] + zh]
    return tuple(phrase)


def italian_form(adjective, gender, plural):
    return adjective[2 + 2 * plural + (gender == "f")]


def some(number, adjective, noun):
    """A red apple or, with a number, two red apples: a direct object in four languages."""
    en, ens, de, g, des, it, ig, its, zh, measure = noun
    if number:
        return (f"{number[0]} {adjective[0]} {ens}", f"{number[1]} {adjective[1]}e {des}",
                f"{number[2]} {its} {italian_form(adjective, ig, True)}", f"{number[3]}{measure}{adjective[-1]}{zh}")
    article, ending = {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")}[g]
    return (f"{'an' if adjective[0][0] in 'aeiou' else 'a'} {adjective[0]} {en}",
            f"{article} {adjective[1]}{ending} {de}",
            f"{a_italian(it, ig)}{it} {italian_form(adjective, ig, False)}", f"一{measure}{adjective[-1]}{zh}")


def subject(rng):
    """A name or "the young doctor": its full form and the short one used in questions."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES)
        return name, name
    en, de, de_f, it, it_f, zh, g = rng.choice(PEOPLE)
    de, it = (de_f, it_f) if g == "f" else (de, it)
    c = rng.choice(CHARACTERS)
    adjective = c[3] if g == "f" else c[2]
    italian = f"{the_italian(it, g)}{it} {adjective}"
    if c[0] == "young":  # giovane goes before its noun
        italian = f"{the_italian(adjective, g)}{adjective} {it}"
    article = the_german("nom", g)
    return ((f"the {c[0]} {en}", f"{article} {weak(c[1], 'nom', g)} {de}", italian, c[4] + zh),
            (f"the {en}", f"{article} {de}", the_italian(it, g) + it, zh))


def at_italian(city):
    return f"{'ad' if city[2][0] == 'A' else 'a'} {city[2]}"


def other(rng, draw, taken):
    """Draws again until the result differs from `taken`."""
    while (new := draw(rng)) == taken or new[-1] == taken[-1]:
        pass
    return new


def pick(table):
    return lambda rng: rng.choice(table)


def close(texts, mark="."):
    """Four phrases -> four sentences: a capital first, a mark last."""
    marks = {".": "...。", "?": "???？"}[mark]
    return tuple(text[0].upper() + text[1:] + m for text, m in zip(texts, marks))


def question(en, de, it, zh):
    return close((en, de, it, zh), "?")


# ----------------------------------------------------------------------------------------------------------------------
# Sentence shapes: each returns the sentence, its facts (question, answer phrase) and its traps (question)


def deed(rng):
    """As in: On Monday Anna bought two red apples. The young doctor found a new hat in the park."""
    (full, who), noun, verb = subject(rng), rng.choice(OBJECTS), rng.choice(DEEDS)
    colour = rng.random() < 0.6
    adjective = rng.choice(COLOURS if colour else QUALITIES)
    number = rng.choice(NUMBERS) if rng.random() < 0.6 else None
    what, time, place = some(number, adjective, noun), rng.choice(PAST), rng.choice(PLACES)
    past, base, de, it, zh = verb
    if rng.random() < 0.5:
        place = None
        text = (f"{time[0]} {full[0]} {past} {what[0]}", f"{time[1]} {de} {full[1]} {what[1]}",
                f"{time[2]} {full[2]} ha {it} {what[2]}", f"{time[3]}{full[3]}{zh}了{what[3]}")
    else:
        time = None
        text = (f"{full[0]} {past} {what[0]} {place[0]}", f"{full[1]} {de} {place[1]} {what[1]}",
                f"{full[2]} ha {it} {what[2]} {place[2]}", f"{full[3]}{place[3]}{zh}了{what[3]}")

    def who_did(noun):
        o = the(noun, case="acc", plural=number is not None)
        return question(f"who {past} {o[0]}", f"wer {de} {o[1]}", f"chi ha {it} {o[2]}", f"谁{zh}了{o[3]}")

    def what_did(who):
        return question(f"what did {who[0]} {base}", f"was {de} {who[1]}", f"che cosa ha {it} {who[2]}",
                        f"{who[3]}{zh}了什么")

    def ask(en, de_, it_, zh_):  # where or when
        return question(f"{en} did {who[0]} {base} {o[0]}", f"{de_} {de} {who[1]} {o[1]}",
                        f"{it_} {who[2]} ha {it} {o[2]}",
                        f"{who[3]}{zh_}{zh}了{o[3]}")

    o = the(noun, case="acc", plural=number is not None)
    where, when = ask("where", "wo", "dove", "在哪里"), ask("when", "wann", "quando", "什么时候")
    facts = [(who_did(noun), full), (what_did(who), what), (where, place) if place else (when, time)]
    traps = [who_did(other(rng, pick(OBJECTS), noun)), what_did(other(rng, subject, (full, who))[1]),
             when if place else where, price_question(noun, number is not None)]
    many = question(f"how many {noun[1]} did {who[0]} {base}", f"wie viele {noun[4]} {de} {who[1]}",
                    f"{'quante' if noun[6] == 'f' else 'quanti'} {noun[7]} ha {it} {who[2]}",
                    f"{who[3]}{zh}了多少{noun[9]}{noun[8]}")
    if number:
        facts.append((many, number[:3] + (number[3] + noun[9],)))
    hue = colour_question(noun, number is not None)
    (facts.append((hue, colour_answer(adjective, noun[6], number is not None))) if colour else traps.append(hue))
    return close(text), facts, traps


def colour_question(noun, plural):
    o = the(noun, plural=plural)
    return question(f"what color {'are' if plural else 'is'} {o[0]}",
                    f"welche Farbe {'haben' if plural else 'hat'} {o[1]}",
                    f"di che colore {'sono' if plural else 'è'} {o[2]}", f"{o[3]}是什么颜色的")


def colour_answer(colour, italian_gender, plural):
    return colour[0], colour[1], italian_form(colour, italian_gender, plural), colour[-1].removesuffix("的")


def price_question(noun, plural):
    o = the(noun, plural=plural)
    return question(f"how much {'do' if plural else 'does'} {o[0]} cost",
                    f"wie viel {'kosten' if plural else 'kostet'} {o[1]}",
                    f"quanto {'costano' if plural else 'costa'} {o[2]}", f"{o[3]}多少钱")


def where_question(noun, plural):
    o = the(noun, plural=plural)
    return question(f"where {'are' if plural else 'is'} {o[0]}", f"wo {'sind' if plural else 'ist'} {o[1]}",
                    f"dove {'sono' if plural else 'è'} {o[2]}", f"{o[3]}在哪里")


def location(rng):
    """As in: The red cups are on the table in the kitchen."""
    noun, plural, colour = rng.choice(OBJECTS), rng.random() < 0.5, rng.random() < 0.6
    adjective = rng.choice(COLOURS if colour else QUALITIES)
    spot, room = rng.choice(SPOTS), rng.choice(ROOMS)
    what = the(noun, adjective, plural=plural)
    place = *(f"{a} {b}" for a, b in zip(spot[:3], room)), f"在{room[3]}的{spot[3]}"
    text = (f"{what[0]} {'are' if plural else 'is'} {place[0]}", f"{what[1]} {'sind' if plural else 'ist'} {place[1]}",
            f"{what[2]} {'sono' if plural else 'è'} {place[2]}", f"{what[3]}{place[3]}")

    def what_is(spot):
        return question(f"what is {spot[0]}", f"was ist {spot[1]}", f"che cosa c'è {spot[2]}", f"{spot[3]}有什么")

    facts = [(where_question(noun, plural), place), (what_is(spot), what)]
    traps = [where_question(other(rng, pick(OBJECTS), noun), plural), what_is(other(rng, pick(SPOTS), spot)),
             price_question(noun, plural)]
    hue = colour_question(noun, plural)
    (facts.append((hue, colour_answer(adjective, noun[6], plural))) if colour else traps.append(hue))
    return close(text), facts, traps


def price(rng):
    """As in: The red hat costs twelve euros at the market."""
    noun, colour = rng.choice(OBJECTS), rng.random() < 0.6
    adjective = rng.choice(COLOURS if colour else QUALITIES)
    number, place = rng.choice(PRICES), rng.choice(SHOPS)
    what = the(noun, adjective)
    cost = f"{number[0]} euros", f"{number[1]} Euro", f"{number[2]} euro", f"{number[3]}欧元"
    text = (f"{what[0]} costs {cost[0]} {place[0]}", f"{what[1]} kostet {place[1]} {cost[1]}",
            f"{what[2]} costa {cost[2]} {place[2]}", f"{what[3]}{place[3]}卖{cost[3]}")

    def what_costs(cost):
        return question(f"what costs {cost[0]}", f"was kostet {cost[1]}", f"che cosa costa {cost[2]}",
                        f"什么东西卖{cost[3]}")

    n = other(rng, pick(PRICES), number)
    facts = [(price_question(noun, False), cost), (what_costs(cost), what)]
    traps = [price_question(other(rng, pick(OBJECTS), noun), False),
             what_costs((f"{n[0]} euros", f"{n[1]} Euro", f"{n[2]} euro", f"{n[3]}欧元"))]
    hue = colour_question(noun, False)
    (facts.append((hue, colour_answer(adjective, noun[6], False))) if colour else traps.append(hue))
    return close(text), facts, traps


def plan(rng):
    """As in: Anna wants to play tennis with her brother on Monday."""
    name, (en, de, g, it, zh) = rng.choice(NAMES), rng.choice(RELATIVES)
    what, time = rng.choice(PLANS), rng.choice(FUTURE)
    her = name[0] in FEMALE
    owner = "ihr" if her else "sein"
    whom = (f"with {'her' if her else 'his'} {en}", f"mit {owner}{'er' if g == 'f' else 'em'} {de}",
            f"con {'sua' if g == 'f' else 'suo'} {it}", f"和{'她' if her else '他'}的{zh}")
    text = (f"{name[0]} wants to {what[0]} {whom[0]} {time[0]}", f"{name[1]} will {time[1]} {whom[1]} {what[1]}",
            f"{time[2]} {name[2]} vuole {what[2]} {whom[2]}", f"{name[3]}{time[3]}想{whom[3]}{what[3]}")

    def who(what):
        return question(f"who wants to {what[0]}", f"wer will {what[1]}", f"chi vuole {what[2]}", f"谁想{what[3]}")

    def what_does(name):
        return question(f"what does {name[0]} want to do", f"was will {name[1]} machen",
                        f"che cosa vuole fare {name[2]}",
                        f"{name[3]}想做什么")

    def when(name):
        return question(f"when does {name[0]} want to {what[0]}", f"wann will {name[1]} {what[1]}",
                        f"quando vuole {what[2]} {name[2]}", f"{name[3]}想什么时候{what[3]}")

    def with_whom(name):
        return question(f"with whom does {name[0]} want to {what[0]}", f"mit wem will {name[1]} {what[1]}",
                        f"con chi vuole {what[2]} {name[2]}", f"{name[3]}想和谁一起{what[3]}")

    stranger = other(rng, pick(NAMES), name)
    facts = [(who(what), name), (what_does(name), what), (when(name), time), (with_whom(name), whom)]
    traps = [who(other(rng, pick(PLANS), what)), what_does(stranger), when(stranger), with_whom(stranger)]
    return close(text), facts, traps


def travel(rng):
    """As in: The tired nurse travels to Rome by train in May."""
    (full, who), city, vehicle = subject(rng), rng.choice(CITIES), rng.choice(TRANSPORT)
    month = rng.choice(MONTHS)
    to = f"to {city[0]}", f"nach {city[1]}", at_italian(city), city[3]
    text = (f"{full[0]} travels {to[0]} {vehicle[0]} {month[0]}", f"{full[1]} reist {month[1]} {vehicle[1]} {to[1]}",
            f"{month[2]} {full[2]} va {to[2]} {vehicle[2]}", f"{full[3]}{month[3]}{vehicle[3]}去{to[3]}")

    def who_goes(city):
        return question(f"who travels to {city[0]}", f"wer reist nach {city[1]}", f"chi va {at_italian(city)}",
                        f"谁去{city[3]}")

    def ask(en, de, it, zh, who):
        return question(f"{en} does {who[0]} travel", f"{de} reist {who[1]}", f"{it} {who[2]}", f"{who[3]}{zh}")

    words = {"where": ("where", "wohin", "dove va", "去哪里"), "how": ("how", "wie", "come viaggia", "怎么去"),
             "when": ("when", "wann", "quando parte", "什么时候去")}
    stranger = other(rng, subject, (full, who))[1]
    answers = {"where": to, "how": vehicle, "when": month}
    facts = [(who_goes(city), full)] + [(ask(*words[w], who), answers[w]) for w in words]
    traps = [who_goes(other(rng, pick(CITIES), city))] + [ask(*words[w], stranger) for w in words]
    return close(text), facts, traps


def family(rng):
    """As in: My sister lives in Rome and works as a doctor."""
    (en, de, g, it, zh), city = rng.choice(RELATIVES), rng.choice(CITIES)
    job = rng.choice(PEOPLE)
    german, italian = (job[2], job[4]) if g == "f" else (job[1], job[3])

    def my(relative):
        en, de, g, it, zh = relative
        return f"my {en}", f"mein{'e' if g == 'f' else ''} {de}", f"{'mia' if g == 'f' else 'mio'} {it}", f"我的{zh}"

    who, place = my((en, de, g, it, zh)), (f"in {city[0]}", f"in {city[1]}", at_italian(city), f"在{city[3]}")
    work = f"{'an' if job[0][0] in 'aeiou' else 'a'} {job[0]}", german, italian, job[5]
    text = (f"{who[0]} lives {place[0]} and works as {work[0]}",
            f"{who[1]} wohnt {place[1]} und arbeitet als {work[1]}",
            f"{who[2]} vive {place[2]} e lavora come {work[2]}", f"{who[3]}住{place[3]}，是{work[3]}")

    def lives(who):
        return question(f"where does {who[0]} live", f"wo wohnt {who[1]}", f"dove vive {who[2]}", f"{who[3]}住在哪里")

    def works(who):
        return question(f"what does {who[0]} work as", f"was ist {who[1]} von Beruf", f"che lavoro fa {who[2]}",
                        f"{who[3]}做什么工作")

    def who_lives(place):
        return question(f"who lives {place[0]}", f"wer wohnt {place[1]}", f"chi vive {place[2]}", f"谁住{place[3]}")

    stranger = my(other(rng, pick(RELATIVES), (en, de, g, it, zh)))
    c = other(rng, pick(CITIES), city)
    facts = [(lives(who), place), (works(who), work), (who_lives(place), who)]
    traps = [lives(stranger), works(stranger), who_lives((f"in {c[0]}", f"in {c[1]}", at_italian(c), f"在{c[3]}"))]
    traps.append(question(f"how old is {who[0]}", f"wie alt ist {who[1]}", f"quanti anni ha {who[2]}", f"{who[3]}几岁了"))
    return close(text), facts, traps


def animal(rng):
    """As in: The black dog sleeps under the tree every morning."""
    noun, colour = rng.choice(ANIMALS), rng.random() < 0.6
    adjective = rng.choice(COLOURS if colour else ANIMAL_QUALITIES)
    verb, place, often = rng.choice(HABITS), rng.choice(OUTSIDE), rng.choice(OFTEN)
    what, short = the(noun, adjective), the(noun)
    text = (f"{what[0]} {verb[0]} {place[0]} {often[0]}", f"{what[1]} {verb[1]} {often[1]} {place[1]}",
            f"{what[2]} {verb[2]} {place[2]} {often[2]}", f"{what[3]}{often[3]}{place[3]}{verb[3]}")

    def who(verb, place):
        return question(f"who {verb[0]} {place[0]}", f"wer {verb[1]} {place[1]}", f"chi {verb[2]} {place[2]}",
                        f"谁{place[3]}{verb[3]}")

    def ask(en, de, it, zh, short):
        return question(f"{en} does {short[0]} {verb[0].removesuffix('s')}", f"{de} {verb[1]} {short[1]}",
                        f"{it} {verb[2]} {short[2]}", f"{short[3]}{zh}{verb[3]}")

    where, when = ("where", "wo", "dove", "在哪里"), ("when", "wann", "quando", "什么时候")
    stranger = the(other(rng, pick(ANIMALS), noun))
    facts = [(who(verb, place), what), (ask(*where, short), place), (ask(*when, short), often)]
    traps = [who(verb, other(rng, pick(OUTSIDE), place)), who(other(rng, pick(HABITS), verb), place),
             ask(*where, stranger), ask(*when, stranger)]
    hue = colour_question(noun, False)
    (facts.append((hue, colour_answer(adjective, noun[6], False))) if colour else traps.append(hue))
    return close(text), facts, traps


def taste(rng):
    """As in: The happy baker likes fish and rice, but not cheese."""
    full, who = subject(rng)
    a, b, c, d = rng.sample(TASTES, 4)
    text = (f"{full[0]} likes {a[0]} and {b[0]} but not {c[0]}", f"{full[1]} mag {a[1]} und {b[1]}, aber {c[2]} {c[1]}",
            f"{full[2]} ama {a[3]} e {b[3]}, ma non {c[3]}", f"{full[3]}喜欢{a[4]}和{b[4]}，但是不喜欢{c[4]}")
    both = f"{a[0]} and {b[0]}", f"{a[1]} und {b[1]}", f"{a[3]} e {b[3]}", f"{a[4]}和{b[4]}"

    def likes(who):
        return question(f"what does {who[0]} like", f"was mag {who[1]}", f"che cosa ama {who[2]}", f"{who[3]}喜欢什么")

    def dislikes(who):
        return question(f"what does {who[0]} not like", f"was mag {who[1]} nicht", f"che cosa non ama {who[2]}",
                        f"{who[3]}不喜欢什么")

    def who_likes(t):
        return question(f"who likes {t[0]}", f"wer mag {t[1]}", f"chi ama {t[3]}", f"谁喜欢{t[4]}")

    stranger = other(rng, subject, (full, who))[1]
    facts = [(likes(who), both), (dislikes(who), (c[0], c[1], c[3], c[4])), (who_likes(a), full), (who_likes(b), full)]
    return close(text), facts, [likes(stranger), dislikes(stranger), who_likes(d), who_likes(c)]


SHAPES = (deed, location, price, plan, travel, family, animal, taste)
WEIGHTS = (4, 2, 2, 2, 2, 2, 2, 2)


def split_of(english):
    """train, dev or test: decided by the sentence itself, so nothing made from the grammar can mix them."""
    return {0: "dev", 1: "test"}.get(zlib.crc32(english.encode()) % 50, "train")


def example(rng, split="train"):
    """A sentence of the split: its four texts, facts as (question, answer) of four texts each, traps as questions."""
    while True:
        text, facts, traps = rng.choices(SHAPES, WEIGHTS)[0](rng)
        if split_of(text[0]) == split:
            return text, [(q, close(a)) for q, a in facts], traps


def count_sentences():
    """Different sentences in a language, a lower bound: subjects, things, times and so on multiplied per shape."""
    subjects, things = len(NAMES) + len(PEOPLE) * len(CHARACTERS), len(OBJECTS) * len(COLOURS + QUALITIES)
    return {
        "deed": subjects * len(DEEDS) * things * (len(NUMBERS) + 1) * (len(PAST) + len(PLACES)),
        "location": things * 2 * len(SPOTS) * len(ROOMS), "price": things * len(PRICES) * len(SHOPS),
        "plan": len(NAMES) * len(PLANS) * len(RELATIVES) * len(FUTURE),
        "travel": subjects * len(CITIES) * len(TRANSPORT) * len(MONTHS),
        "family": len(RELATIVES) * len(CITIES) * len(PEOPLE),
        "animal": len(ANIMALS) * len(COLOURS + ANIMAL_QUALITIES) * len(HABITS) * len(OUTSIDE) * len(OFTEN),
        "taste": subjects * len(TASTES) * (len(TASTES) - 1) * (len(TASTES) - 2),
    }
