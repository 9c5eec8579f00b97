"""The demo's language: a grammar that speaks English, German, Italian and Chinese at once.

example(rng) draws one of eight sentence shapes and fills it from the word tables below. Every text
is a tuple of four strings in the order of LANGUAGES. Beside the sentence come its facts, questions
with their answers, and its traps, questions that the sentence does not answer.
"""

import re
import zlib
from random import Random
from typing import NamedTuple

import data

LANGUAGES = ("en", "de", "it", "zh")
REFUSALS = tuple(data.REFUSALS[language] for language in LANGUAGES)

Texts = tuple[str, str, str, str]  # one text in the order of LANGUAGES

# --------------------------------------------------------------------------------------------------
# Words. A line of four is English, German, Italian, Chinese; m, f and n are genders.


class Noun(NamedTuple):
    en: str
    en_plural: str
    de: str
    de_gender: str
    de_plural: str
    it: str
    it_gender: str
    it_plural: str
    zh: str
    zh_measure: str


class Adjective(NamedTuple):
    en: str
    de_stem: str
    it_m: str
    it_f: str
    it_m_plural: str
    it_f_plural: str
    zh: str  # as it stands before a noun


def table(lines):
    """Lines of words with commas between them -> a list of tuples of words."""
    return [tuple(line.strip().split(", ")) for line in lines.strip().splitlines()]


def nouns(lines):
    return [Noun(*words) for words in table(lines)]


def adjectives(lines):
    return [Adjective(*words) for words in table(lines)]


NAMES = [
    (name, name, name, chinese)
    for name, chinese in table("""
    Anna, 安娜
    Maria, 玛丽亚
    Laura, 劳拉
    Emma, 艾玛
    Julia, 朱莉娅
    Sara, 萨拉
    Paul, 保罗
    Peter, 彼得
    Marco, 马可
    Thomas, 托马斯
    David, 大卫
    Martin, 马丁
""")
]
FEMALE = {"Anna", "Maria", "Laura", "Emma", "Julia", "Sara"}
# English, German man and woman, Italian man and woman, Chinese, gender in the sentences
PEOPLE = table("""
    doctor, Arzt, Ärztin, medico, dottoressa, 医生, m
    teacher, Lehrer, Lehrerin, maestro, maestra, 老师, f
    nurse, Krankenpfleger, Krankenschwester, infermiere, infermiera, 护士, f
    baker, Bäcker, Bäckerin, fornaio, fornaia, 面包师, m
    gardener, Gärtner, Gärtnerin, giardiniere, giardiniera, 园丁, m
    cook, Koch, Köchin, cuoco, cuoca, 厨师, m
    singer, Sänger, Sängerin, cantante, cantante, 歌手, f
    writer, Schriftsteller, Schriftstellerin, scrittore, scrittrice, 作家, m
    driver, Fahrer, Fahrerin, autista, autista, 司机, m
    student, Student, Studentin, studente, studentessa, 学生, f
    engineer, Ingenieur, Ingenieurin, ingegnere, ingegnere, 工程师, m
    painter, Maler, Malerin, pittore, pittrice, 画家, f
    dentist, Zahnarzt, Zahnärztin, dentista, dentista, 牙医, m
""")
# English, German, German gender, Italian, Chinese
RELATIVES = table("""
    mother, Mutter, f, madre, 妈妈
    father, Vater, m, padre, 爸爸
    brother, Bruder, m, fratello, 哥哥
    sister, Schwester, f, sorella, 姐姐
    grandmother, Großmutter, f, nonna, 奶奶
    grandfather, Großvater, m, nonno, 爷爷
    uncle, Onkel, m, zio, 叔叔
    aunt, Tante, f, zia, 阿姨
    son, Sohn, m, figlio, 儿子
    daughter, Tochter, f, figlia, 女儿
""")
OBJECTS = nouns("""
    apple, apples, Apfel, m, Äpfel, mela, f, mele, 苹果, 个
    book, books, Buch, n, Bücher, libro, m, libri, 书, 本
    cup, cups, Tasse, f, Tassen, tazza, f, tazze, 杯子, 个
    hat, hats, Hut, m, Hüte, cappello, m, cappelli, 帽子, 顶
    bag, bags, Tasche, f, Taschen, borsa, f, borse, 包, 个
    chair, chairs, Stuhl, m, Stühle, sedia, f, sedie, 椅子, 把
    lamp, lamps, Lampe, f, Lampen, lampada, f, lampade, 灯, 盏
    flower, flowers, Blume, f, Blumen, fiore, m, fiori, 花, 朵
    shirt, shirts, Hemd, n, Hemden, camicia, f, camicie, 衬衫, 件
    coat, coats, Mantel, m, Mäntel, cappotto, m, cappotti, 大衣, 件
    key, keys, Schlüssel, m, Schlüssel, chiave, f, chiavi, 钥匙, 把
    ball, balls, Ball, m, Bälle, palla, f, palle, 球, 个
    box, boxes, Kiste, f, Kisten, scatola, f, scatole, 盒子, 个
    bottle, bottles, Flasche, f, Flaschen, bottiglia, f, bottiglie, 瓶子, 个
    umbrella, umbrellas, Regenschirm, m, Regenschirme, ombrello, m, ombrelli, 雨伞, 把
    bicycle, bicycles, Fahrrad, n, Fahrräder, bicicletta, f, biciclette, 自行车, 辆
    picture, pictures, Bild, n, Bilder, quadro, m, quadri, 画, 幅
    pencil, pencils, Bleistift, m, Bleistifte, matita, f, matite, 铅笔, 支
    plate, plates, Teller, m, Teller, piatto, m, piatti, 盘子, 个
    knife, knives, Messer, n, Messer, coltello, m, coltelli, 刀, 把
    dress, dresses, Kleid, n, Kleider, vestito, m, vestiti, 连衣裙, 条
    scarf, scarves, Schal, m, Schals, sciarpa, f, sciarpe, 围巾, 条
    mirror, mirrors, Spiegel, m, Spiegel, specchio, m, specchi, 镜子, 面
    suitcase, suitcases, Koffer, m, Koffer, valigia, f, valigie, 行李箱, 个
""")
ANIMALS = nouns("""
    dog, dogs, Hund, m, Hunde, cane, m, cani, 狗, 只
    cat, cats, Katze, f, Katzen, gatto, m, gatti, 猫, 只
    bird, birds, Vogel, m, Vögel, uccello, m, uccelli, 鸟, 只
    horse, horses, Pferd, n, Pferde, cavallo, m, cavalli, 马, 匹
    mouse, mice, Maus, f, Mäuse, topo, m, topi, 老鼠, 只
    duck, ducks, Ente, f, Enten, anatra, f, anatre, 鸭子, 只
""")
COLOURS = adjectives("""
    red, rot, rosso, rossa, rossi, rosse, 红色的
    blue, blau, blu, blu, blu, blu, 蓝色的
    green, grün, verde, verde, verdi, verdi, 绿色的
    black, schwarz, nero, nera, neri, nere, 黑色的
    white, weiß, bianco, bianca, bianchi, bianche, 白色的
    yellow, gelb, giallo, gialla, gialli, gialle, 黄色的
    brown, braun, marrone, marrone, marroni, marroni, 棕色的
    gray, grau, grigio, grigia, grigi, grigie, 灰色的
""")
QUALITIES = adjectives("""
    new, neu, nuovo, nuova, nuovi, nuove, 新
    old, alt, vecchio, vecchia, vecchi, vecchie, 旧
    big, groß, grande, grande, grandi, grandi, 大
    small, klein, piccolo, piccola, piccoli, piccole, 小
    cheap, billig, economico, economica, economici, economiche, 便宜的
    expensive, teur, costoso, costosa, costosi, costose, 昂贵的
    clean, sauber, pulito, pulita, puliti, pulite, 干净的
    heavy, schwer, pesante, pesante, pesanti, pesanti, 沉重的
""")
ANIMAL_QUALITIES = [quality for quality in QUALITIES if quality.en in ("big", "small")]
# Adjectives of people: English, German stem, Italian man and woman, Chinese
CHARACTERS = table("""
    young, jung, giovane, giovane, 年轻的
    old, alt, anziano, anziana, 年老的
    tall, groß, alto, alta, 高个子
    friendly, freundlich, gentile, gentile, 友好的
    tired, müd, stanco, stanca, 疲惫的
    famous, berühmt, famoso, famosa, 著名的
    happy, glücklich, felice, felice, 快乐的
    rich, reich, ricco, ricca, 富有的
""")
# English past and base form, German, Italian participle, Chinese before 了
DEEDS = table("""
    bought, buy, kaufte, comprato, 买
    sold, sell, verkaufte, venduto, 卖
    found, find, fand, trovato, 找到
    lost, lose, verlor, perso, 丢
    saw, see, sah, visto, 看见
    hid, hide, versteckte, nascosto, 藏
    drew, draw, zeichnete, disegnato, 画
    stole, steal, stahl, rubato, 偷
""")
NUMBERS = table("""
    two, zwei, due, 两
    three, drei, tre, 三
    four, vier, quattro, 四
    five, fünf, cinque, 五
    six, sechs, sei, 六
    seven, sieben, sette, 七
    eight, acht, otto, 八
    nine, neun, nove, 九
    ten, zehn, dieci, 十
""")
PRICES = NUMBERS + table("""
    eleven, elf, undici, 十一
    twelve, zwölf, dodici, 十二
    twenty, zwanzig, venti, 二十
    thirty, dreißig, trenta, 三十
    fifty, fünfzig, cinquanta, 五十
    a hundred, hundert, cento, 一百
""")
PLACES = table("""
    at the market, auf dem Markt, al mercato, 在市场
    in the garden, im Garten, in giardino, 在花园里
    in the kitchen, in der Küche, in cucina, 在厨房里
    at the school, in der Schule, a scuola, 在学校
    at the station, am Bahnhof, alla stazione, 在车站
    in the park, im Park, al parco, 在公园里
    in the library, in der Bibliothek, in biblioteca, 在图书馆
    at the airport, am Flughafen, all'aeroporto, 在机场
    in the hotel, im Hotel, in albergo, 在酒店
    in the office, im Büro, in ufficio, 在办公室
    in the museum, im Museum, al museo, 在博物馆
    on the beach, am Strand, sulla spiaggia, 在海滩上
    in the church, in der Kirche, in chiesa, 在教堂里
    in the village, im Dorf, nel villaggio, 在村子里
    in the hospital, im Krankenhaus, in ospedale, 在医院
    in the theater, im Theater, a teatro, 在剧院
""")
SHOPS = [
    place
    for place in PLACES
    if place[0].endswith(("market", "airport", "museum", "hotel", "village"))
]
# Places inside; the Chinese one follows "在" and a room.
SPOTS = table("""
    on the table, auf dem Tisch, sul tavolo, 桌子上
    under the bed, unter dem Bett, sotto il letto, 床下
    next to the door, neben der Tür, accanto alla porta, 门旁边
    behind the sofa, hinter dem Sofa, dietro il divano, 沙发后面
    in front of the window, vor dem Fenster, davanti alla finestra, 窗户前面
    on the floor, auf dem Boden, sul pavimento, 地板上
""")
ROOMS = table("""
    in the kitchen, in der Küche, in cucina, 厨房
    in the bedroom, im Schlafzimmer, in camera da letto, 卧室
    in the living room, im Wohnzimmer, in soggiorno, 客厅
    in the office, im Büro, in ufficio, 办公室
    in the library, in der Bibliothek, in biblioteca, 图书馆
    in the hotel, im Hotel, in albergo, 酒店
""")
OUTSIDE = table("""
    under the tree, unter dem Baum, sotto l'albero, 在树下
    behind the house, hinter dem Haus, dietro la casa, 在房子后面
    next to the river, neben dem Fluss, accanto al fiume, 在河边
    in the garden, im Garten, in giardino, 在花园里
    in front of the door, vor der Tür, davanti alla porta, 在门前
    in the park, im Park, al parco, 在公园里
""")
HABITS = table("""
    sleeps, schläft, dorme, 睡觉
    plays, spielt, gioca, 玩耍
    waits, wartet, aspetta, 等待
    eats, frisst, mangia, 吃东西
    drinks, trinkt, beve, 喝水
""")
OFTEN = table("""
    every morning, jeden Morgen, ogni mattina, 每天早上
    every evening, jeden Abend, ogni sera, 每天晚上
    every day, jeden Tag, ogni giorno, 每天
    on Sundays, sonntags, la domenica, 每个星期天
""")
WEEKDAYS = table("""
    on Monday, am Montag, lunedì, 星期一
    on Tuesday, am Dienstag, martedì, 星期二
    on Wednesday, am Mittwoch, mercoledì, 星期三
    on Thursday, am Donnerstag, giovedì, 星期四
    on Friday, am Freitag, venerdì, 星期五
    on Saturday, am Samstag, sabato, 星期六
    on Sunday, am Sonntag, domenica, 星期天
""")
PAST = WEEKDAYS + table("""
    yesterday, gestern, ieri, 昨天
    this morning, heute Morgen, stamattina, 今天早上
    last week, letzte Woche, la settimana scorsa, 上周
    last month, letzten Monat, il mese scorso, 上个月
    last year, letztes Jahr, l'anno scorso, 去年
""")
FUTURE = WEEKDAYS + table("""
    tomorrow, morgen, domani, 明天
    tonight, heute Abend, stasera, 今天晚上
    next week, nächste Woche, la settimana prossima, 下周
    next month, nächsten Monat, il mese prossimo, 下个月
""")
MONTHS = table("""
    in January, im Januar, a gennaio, 一月
    in February, im Februar, a febbraio, 二月
    in March, im März, a marzo, 三月
    in April, im April, ad aprile, 四月
    in May, im Mai, a maggio, 五月
    in June, im Juni, a giugno, 六月
    in July, im Juli, a luglio, 七月
    in August, im August, ad agosto, 八月
    in September, im September, a settembre, 九月
    in October, im Oktober, a ottobre, 十月
    in November, im November, a novembre, 十一月
    in December, im Dezember, a dicembre, 十二月
""")
CITIES = table("""
    Berlin, Berlin, Berlino, 柏林
    Rome, Rom, Roma, 罗马
    Paris, Paris, Parigi, 巴黎
    London, London, Londra, 伦敦
    Vienna, Wien, Vienna, 维也纳
    Milan, Mailand, Milano, 米兰
    Madrid, Madrid, Madrid, 马德里
    Venice, Venedig, Venezia, 威尼斯
    Zurich, Zürich, Zurigo, 苏黎世
    Prague, Prag, Praga, 布拉格
    Hamburg, Hamburg, Amburgo, 汉堡
    Florence, Florenz, Firenze, 佛罗伦萨
    Lisbon, Lissabon, Lisbona, 里斯本
    Athens, Athen, Atene, 雅典
    Beijing, Peking, Pechino, 北京
""")
TRANSPORT = table("""
    by train, mit dem Zug, in treno, 坐火车
    by bus, mit dem Bus, in autobus, 坐公共汽车
    by car, mit dem Auto, in macchina, 开车
    by ship, mit dem Schiff, in nave, 坐船
    by plane, mit dem Flugzeug, in aereo, 坐飞机
    by motorcycle, mit dem Motorrad, in moto, 骑摩托车
""")
# Infinitives
PLANS = table("""
    visit the museum, das Museum besuchen, visitare il museo, 参观博物馆
    play tennis, Tennis spielen, giocare a tennis, 打网球
    play football, Fußball spielen, giocare a calcio, 踢足球
    play chess, Schach spielen, giocare a scacchi, 下国际象棋
    cook soup, Suppe kochen, cucinare la zuppa, 煮汤
    watch a film, einen Film sehen, guardare un film, 看电影
    drink coffee, Kaffee trinken, bere il caffè, 喝咖啡
    eat pizza, Pizza essen, mangiare la pizza, 吃比萨饼
    learn French, Französisch lernen, imparare il francese, 学法语
    listen to music, Musik hören, ascoltare la musica, 听音乐
    go for a walk, spazieren gehen, fare una passeggiata, 去散步
    swim in the lake, im See schwimmen, nuotare nel lago, 在湖里游泳
    sing a song, ein Lied singen, cantare una canzone, 唱歌
    bake a cake, einen Kuchen backen, preparare una torta, 烤蛋糕
    clean the house, das Haus putzen, pulire la casa, 打扫房子
""")
# English, German, the German "no", Italian, Chinese
TASTES = table("""
    music, Musik, keine, la musica, 音乐
    coffee, Kaffee, keinen, il caffè, 咖啡
    tea, Tee, keinen, il tè, 茶
    chocolate, Schokolade, keine, la cioccolata, 巧克力
    fish, Fisch, keinen, il pesce, 鱼
    bread, Brot, kein, il pane, 面包
    milk, Milch, keine, il latte, 牛奶
    sport, Sport, keinen, lo sport, 运动
    cheese, Käse, keinen, il formaggio, 奶酪
    rice, Reis, keinen, il riso, 米饭
""")

# --------------------------------------------------------------------------------------------------
# Grammar


def weak_german(stem, case, gender, plural=False):
    """A German adjective after der, die, das, in case "nom" or "acc"."""
    if plural or (case, gender) == ("acc", "m"):
        return stem + "en"
    return stem + "e"


def the_german(case, gender, plural=False):
    if plural or gender == "f":
        return "die"
    if gender == "n":
        return "das"
    return {"nom": "der", "acc": "den"}[case]


def the_italian(noun, gender, plural=False):
    """The article with the space behind it, if it has one: la mela, l'ombrello, lo zio, gli zii."""
    before_vowel = noun[0] in "aeiou"
    impure_s = noun[0] == "s" and noun[1] not in "aeiou"
    long_form = before_vowel or impure_s or noun[0] == "z" or noun[:2] in ("gn", "ps")
    if plural and gender == "f":
        return "le "
    if plural:
        return "gli " if long_form else "i "
    if before_vowel:
        return "l'"
    if gender == "f":
        return "la "
    return "lo " if long_form else "il "


def a_italian(noun, gender):
    if gender == "f":
        return "un'" if noun[0] in "aeiou" else "una "
    return "uno " if the_italian(noun, "m") == "lo " else "un "


def italian_form(adjective, gender, plural):
    if plural:
        return adjective.it_f_plural if gender == "f" else adjective.it_m_plural
    return adjective.it_f if gender == "f" else adjective.it_m


def definite(noun: Noun, adjective: Adjective | None = None, case="nom", plural=False) -> Texts:
    """The red apple, in four languages; case is that of the German one."""
    english = noun.en_plural if plural else noun.en
    german = noun.de_plural if plural else noun.de
    italian = noun.it_plural if plural else noun.it
    chinese = noun.zh
    german_article = the_german(case, noun.de_gender, plural)
    italian_article = the_italian(italian, noun.it_gender, plural)
    if adjective:
        english = f"{adjective.en} {english}"
        german = f"{weak_german(adjective.de_stem, case, noun.de_gender, plural)} {german}"
        italian = f"{italian} {italian_form(adjective, noun.it_gender, plural)}"
        chinese = adjective.zh + chinese
    return f"the {english}", f"{german_article} {german}", italian_article + italian, chinese


def indefinite(noun: Noun, adjective: Adjective, number: Texts | None) -> Texts:
    """A red apple or, with a number, two red apples: a direct object in four languages."""
    italian_adjective = italian_form(adjective, noun.it_gender, number is not None)
    chinese = f"{noun.zh_measure}{adjective.zh}{noun.zh}"
    if number:
        return (
            f"{number[0]} {adjective.en} {noun.en_plural}",
            f"{number[1]} {adjective.de_stem}e {noun.de_plural}",
            f"{number[2]} {noun.it_plural} {italian_adjective}",
            number[3] + chinese,
        )
    endings = {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")}
    german_article, ending = endings[noun.de_gender]
    return (
        f"{a_english(adjective.en)} {noun.en}",
        f"{german_article} {adjective.de_stem}{ending} {noun.de}",
        f"{a_italian(noun.it, noun.it_gender)}{noun.it} {italian_adjective}",
        "一" + chinese,
    )


def a_english(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def at_italian(city):
    return f"ad {city[2]}" if city[2][0] == "A" else f"a {city[2]}"


def to_city(city) -> Texts:
    return f"to {city[0]}", f"nach {city[1]}", at_italian(city), city[3]


def in_city(city) -> Texts:
    return f"in {city[0]}", f"in {city[1]}", at_italian(city), f"在{city[3]}"


def close(texts: Texts, marks="...。") -> Texts:
    """Four phrases -> four sentences: a capital first, a mark last."""
    return tuple(text[0].upper() + text[1:] + m for text, m in zip(texts, marks, strict=True))


# --------------------------------------------------------------------------------------------------
# Sentences and questions: a name, then its templates in the order of LANGUAGES


def templates(lines):
    """Lines of a name and four texts, some on two lines -> {name: [a text for each language]}."""
    named = {}
    for line in re.sub(r"\n +\|", " |", lines).strip().splitlines():
        name, texts = line.split(": ")
        named[name.strip()] = texts.split(" | ")
    return named


TEMPLATES = templates("""
    deed at a time: {time} {full} {did} {what} | {time} {did} {full} {what}
        | {time} {full} ha {did} {what} | {time}{full}{did}了{what}
    deed in a place: {full} {did} {what} {place} | {full} {did} {place} {what}
        | {full} ha {did} {what} {place} | {full}{place}{did}了{what}
    who did: who {did} {thing} | wer {did} {thing} | chi ha {did} {thing} | 谁{did}了{thing}
    what did: what did {who} {do} | was {do} {who} | che cosa ha {do} {who} | {who}{do}了什么
    where did: where did {who} {do} {thing} | wo {do} {who} {thing}
        | dove {who} ha {do} {thing} | {who}在哪里{do}了{thing}
    when did: when did {who} {do} {thing} | wann {do} {who} {thing}
        | quando {who} ha {do} {thing} | {who}什么时候{do}了{thing}
    how many did: {how_many} did {who} {do} | {how_many} {do} {who}
        | {how_many} ha {do} {who} | {who}{do}了{how_many}
    what colour: what color {be} {thing} | welche Farbe {be} {thing}
        | di che colore {be} {thing} | {thing}是什么颜色的
    how much: how much {do} {thing} cost | wie viel {do} {thing}
        | quanto {do} {thing} | {thing}多少钱
    location: {what} {be} {place} | {what} {be} {place} | {what} {be} {place} | {what}{place}
    where is: where {be} {thing} | wo {be} {thing} | dove {be} {thing} | {thing}在哪里
    what is: what is {spot} | was ist {spot} | che cosa c'è {spot} | {spot}有什么
    price: {what} costs {cost} {place} | {what} kostet {place} {cost}
        | {what} costa {cost} {place} | {what}{place}卖{cost}
    what costs: what costs {cost} | was kostet {cost} | che cosa costa {cost} | 什么东西卖{cost}
    plan: {who} wants to {do} {whom} {time} | {who} will {time} {whom} {do}
        | {time} {who} vuole {do} {whom} | {who}{time}想{whom}{do}
    who wants: who wants to {do} | wer will {do} | chi vuole {do} | 谁想{do}
    what wants: what does {who} want to do | was will {who} machen
        | che cosa vuole fare {who} | {who}想做什么
    when wants: when does {who} want to {do} | wann will {who} {do}
        | quando vuole {do} {who} | {who}想什么时候{do}
    with whom: with whom does {who} want to {do} | mit wem will {who} {do}
        | con chi vuole {do} {who} | {who}想和谁一起{do}
    travel: {full} travels {to} {vehicle} {month} | {full} reist {month} {vehicle} {to}
        | {month} {full} va {to} {vehicle} | {full}{month}{vehicle}去{to}
    who travels: who travels {to} | wer reist {to} | chi va {to} | 谁去{to}
    where travels: where does {who} travel | wohin reist {who} | dove va {who} | {who}去哪里
    how travels: how does {who} travel | wie reist {who} | come viaggia {who} | {who}怎么去
    when travels: when does {who} travel | wann reist {who} | quando parte {who} | {who}什么时候去
    family: {who} lives {place} and works as {job} | {who} wohnt {place} und arbeitet als {job}
        | {who} vive {place} e lavora come {job} | {who}住{place}，是{job}
    where lives: where does {who} live | wo wohnt {who} | dove vive {who} | {who}住在哪里
    what works: what does {who} work as | was ist {who} von Beruf
        | che lavoro fa {who} | {who}做什么工作
    who lives: who lives {place} | wer wohnt {place} | chi vive {place} | 谁住{place}
    how old: how old is {who} | wie alt ist {who} | quanti anni ha {who} | {who}几岁了
    animal: {what} {does} {place} {often} | {what} {does} {often} {place}
        | {what} {does} {place} {often} | {what}{often}{place}{does}
    who does: who {does} {place} | wer {does} {place} | chi {does} {place} | 谁{place}{does}
    where does: where does {thing} {do} | wo {do} {thing} | dove {do} {thing} | {thing}在哪里{do}
    when does: when does {thing} {do} | wann {do} {thing}
        | quando {do} {thing} | {thing}什么时候{do}
    taste: {full} likes {both} but not {c} | {full} mag {both}, aber {no} {c}
        | {full} ama {both}, ma non {c} | {full}喜欢{both}，但是不喜欢{c}
    both: {a} and {b} | {a} und {b} | {a} e {b} | {a}和{b}
    what likes: what does {who} like | was mag {who} | che cosa ama {who} | {who}喜欢什么
    what dislikes: what does {who} not like | was mag {who} nicht
        | che cosa non ama {who} | {who}不喜欢什么
    who likes: who likes {taste} | wer mag {taste} | chi ama {taste} | 谁喜欢{taste}
""")


def fill(template: str, **phrases: Texts) -> Texts:
    """The four texts of a template: each {name} becomes the phrase of that name in its language."""
    texts = []
    for language, text in enumerate(TEMPLATES[template]):
        words = {name: phrase[language] for name, phrase in phrases.items()}
        texts.append(text.format(**words))
    return tuple(texts)


def ask(template: str, **phrases: Texts) -> Texts:
    return close(fill(template, **phrases), "???？")


# --------------------------------------------------------------------------------------------------
# Drawing, and questions that several shapes share


def subject(rng) -> tuple[Texts, Texts]:
    """A name or "the young doctor": its full form and the short one used in questions."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES)
        return name, name
    english, man, woman, man_italian, woman_italian, chinese, gender = rng.choice(PEOPLE)
    german, italian = (woman, woman_italian) if gender == "f" else (man, man_italian)
    character, stem, it_m, it_f, zh_adjective = rng.choice(CHARACTERS)
    it_adjective = it_f if gender == "f" else it_m
    article = the_german("nom", gender)
    who = (f"the {english}", f"{article} {german}", the_italian(italian, gender) + italian, chinese)

    full_italian = f"{who[2]} {it_adjective}"
    if character == "young":  # giovane goes before its noun
        full_italian = f"{the_italian(it_adjective, gender)}{it_adjective} {italian}"
    full_german = f"{article} {weak_german(stem, 'nom', gender)} {german}"
    return (f"the {character} {english}", full_german, full_italian, zh_adjective + chinese), who


def draw_adjective(rng, qualities=QUALITIES):
    is_colour = rng.random() < 0.6
    return rng.choice(COLOURS if is_colour else qualities)


def pick(words):
    return lambda rng: rng.choice(words)


def draw_other(rng, draw, taken):
    """Draws again until the result differs from `taken`, and its last element from that one's."""
    while True:
        drawn = draw(rng)
        if drawn != taken and drawn[-1] != taken[-1]:
            return drawn


def add_colour(facts, traps, noun, adjective, plural=False):
    """Asks for a thing's colour: a fact if the adjective is one, else a trap."""
    be = ("are", "haben", "sono", "") if plural else ("is", "hat", "è", "")
    asked = ask("what colour", be=be, thing=definite(noun, plural=plural))
    if adjective not in COLOURS:
        traps.append(asked)
        return
    italian = italian_form(adjective, noun.it_gender, plural)
    answer = (adjective.en, adjective.de_stem, italian, adjective.zh.removesuffix("的"))
    facts.append((asked, answer))


def ask_price(noun, plural=False):
    do = ("do", "kosten", "costano", "") if plural else ("does", "kostet", "costa", "")
    return ask("how much", do=do, thing=definite(noun, plural=plural))


# --------------------------------------------------------------------------------------------------
# Sentence shapes: each returns the sentence, its facts (question, answer phrase) and its traps


def deed(rng):
    """As in: On Monday Anna bought two red apples. The young doctor found a new hat in the park."""
    full, who = subject(rng)
    noun = rng.choice(OBJECTS)
    past, base, *others = rng.choice(DEEDS)
    adjective = draw_adjective(rng)
    number = rng.choice(NUMBERS) if rng.random() < 0.6 else None
    time = rng.choice(PAST)
    place = rng.choice(PLACES)
    tells_time = rng.random() < 0.5

    # German, Italian and Chinese have one form for "bought" and "did buy".
    verb = {"did": (past, *others), "do": (base, *others)}
    plural = number is not None
    thing = definite(noun, case="acc", plural=plural)
    what = indefinite(noun, adjective, number)
    where = ask("where did", who=who, thing=thing, **verb)
    when = ask("when did", who=who, thing=thing, **verb)
    facts = [
        (ask("who did", thing=thing, **verb), full),
        (ask("what did", who=who, **verb), what),
    ]
    if tells_time:
        text = fill("deed at a time", full=full, what=what, time=time, **verb)
        facts.append((when, time))
    else:
        text = fill("deed in a place", full=full, what=what, place=place, **verb)
        facts.append((where, place))

    # Traps ask for another thing, another person, and for what is not told.
    other_thing = definite(draw_other(rng, pick(OBJECTS), noun), case="acc", plural=plural)
    _, stranger = draw_other(rng, subject, (full, who))
    traps = [
        ask("who did", thing=other_thing, **verb),
        ask("what did", who=stranger, **verb),
        where if tells_time else when,
        ask_price(noun, plural),
    ]
    if number:
        answer = (*number[:3], number[3] + noun.zh_measure)
        facts.append((ask("how many did", how_many=how_many(noun), who=who, **verb), answer))
    add_colour(facts, traps, noun, adjective, plural)
    return close(text), facts, traps


def how_many(noun: Noun) -> Texts:
    return (
        f"how many {noun.en_plural}",
        f"wie viele {noun.de_plural}",
        f"{'quante' if noun.it_gender == 'f' else 'quanti'} {noun.it_plural}",
        f"多少{noun.zh_measure}{noun.zh}",
    )


def location(rng):
    """As in: The red cups are on the table in the kitchen."""
    noun = rng.choice(OBJECTS)
    plural = rng.random() < 0.5
    adjective = draw_adjective(rng)
    spot = rng.choice(SPOTS)
    room = rng.choice(ROOMS)
    be = ("are", "sind", "sono", "") if plural else ("is", "ist", "è", "")
    what = definite(noun, adjective, plural=plural)
    place = tuple(f"{spot[i]} {room[i]}" for i in range(3)) + (f"在{room[3]}的{spot[3]}",)

    def where_is(noun):
        return ask("where is", be=be, thing=definite(noun, plural=plural))

    facts = [(where_is(noun), place), (ask("what is", spot=spot), what)]
    traps = [
        where_is(draw_other(rng, pick(OBJECTS), noun)),
        ask("what is", spot=draw_other(rng, pick(SPOTS), spot)),
        ask_price(noun, plural),
    ]
    add_colour(facts, traps, noun, adjective, plural)
    return close(fill("location", what=what, be=be, place=place)), facts, traps


def price(rng):
    """As in: The red hat costs twelve euros at the market."""
    noun = rng.choice(OBJECTS)
    adjective = draw_adjective(rng)
    number = rng.choice(PRICES)
    place = rng.choice(SHOPS)
    what = definite(noun, adjective)
    cost = in_euros(number)
    facts = [(ask_price(noun), cost), (ask("what costs", cost=cost), what)]
    other_cost = in_euros(draw_other(rng, pick(PRICES), number))
    traps = [
        ask_price(draw_other(rng, pick(OBJECTS), noun)),
        ask("what costs", cost=other_cost),
    ]
    add_colour(facts, traps, noun, adjective)
    return close(fill("price", what=what, cost=cost, place=place)), facts, traps


def in_euros(number: Texts) -> Texts:
    return f"{number[0]} euros", f"{number[1]} Euro", f"{number[2]} euro", f"{number[3]}欧元"


def plan(rng):
    """As in: Anna wants to play tennis with her brother on Monday."""
    who = rng.choice(NAMES)
    relative = rng.choice(RELATIVES)
    do = rng.choice(PLANS)
    time = rng.choice(FUTURE)
    whom = with_relative(relative, who[0] in FEMALE)
    facts = [
        (ask("who wants", do=do), who),
        (ask("what wants", who=who), do),
        (ask("when wants", who=who, do=do), time),
        (ask("with whom", who=who, do=do), whom),
    ]
    stranger = draw_other(rng, pick(NAMES), who)
    traps = [
        ask("who wants", do=draw_other(rng, pick(PLANS), do)),
        ask("what wants", who=stranger),
        ask("when wants", who=stranger, do=do),
        ask("with whom", who=stranger, do=do),
    ]
    return close(fill("plan", who=who, do=do, whom=whom, time=time)), facts, traps


def with_relative(relative, hers) -> Texts:
    english, german, gender, italian, chinese = relative
    ihr = "ihr" if hers else "sein"
    return (
        f"with {'her' if hers else 'his'} {english}",
        f"mit {ihr}{'er' if gender == 'f' else 'em'} {german}",
        f"con {'sua' if gender == 'f' else 'suo'} {italian}",
        f"和{'她' if hers else '他'}的{chinese}",
    )


def travel(rng):
    """As in: The tired nurse travels to Rome by train in May."""
    full, who = subject(rng)
    city = rng.choice(CITIES)
    vehicle = rng.choice(TRANSPORT)
    month = rng.choice(MONTHS)
    to = to_city(city)
    facts = [
        (ask("who travels", to=to), full),
        (ask("where travels", who=who), to),
        (ask("how travels", who=who), vehicle),
        (ask("when travels", who=who), month),
    ]
    _, stranger = draw_other(rng, subject, (full, who))
    traps = [
        ask("who travels", to=to_city(draw_other(rng, pick(CITIES), city))),
        ask("where travels", who=stranger),
        ask("how travels", who=stranger),
        ask("when travels", who=stranger),
    ]
    return close(fill("travel", full=full, to=to, vehicle=vehicle, month=month)), facts, traps


def family(rng):
    """As in: My sister lives in Rome and works as a doctor."""
    relative = rng.choice(RELATIVES)
    city = rng.choice(CITIES)
    english, man, woman, man_italian, woman_italian, chinese, _ = rng.choice(PEOPLE)
    who = my(relative)
    place = in_city(city)
    if relative[2] == "f":
        job = (a_english(english), woman, woman_italian, chinese)
    else:
        job = (a_english(english), man, man_italian, chinese)
    facts = [
        (ask("where lives", who=who), place),
        (ask("what works", who=who), job),
        (ask("who lives", place=place), who),
    ]
    stranger = my(draw_other(rng, pick(RELATIVES), relative))
    traps = [
        ask("where lives", who=stranger),
        ask("what works", who=stranger),
        ask("who lives", place=in_city(draw_other(rng, pick(CITIES), city))),
        ask("how old", who=who),
    ]
    return close(fill("family", who=who, place=place, job=job)), facts, traps


def my(relative) -> Texts:
    english, german, gender, italian, chinese = relative
    if gender == "f":
        return f"my {english}", f"meine {german}", f"mia {italian}", f"我的{chinese}"
    return f"my {english}", f"mein {german}", f"mio {italian}", f"我的{chinese}"


def animal(rng):
    """As in: The black dog sleeps under the tree every morning."""
    noun = rng.choice(ANIMALS)
    adjective = draw_adjective(rng, ANIMAL_QUALITIES)
    does = rng.choice(HABITS)
    place = rng.choice(OUTSIDE)
    often = rng.choice(OFTEN)
    do = (does[0].removesuffix("s"), *does[1:])
    what = definite(noun, adjective)
    thing = definite(noun)
    facts = [
        (ask("who does", does=does, place=place), what),
        (ask("where does", thing=thing, do=do), place),
        (ask("when does", thing=thing, do=do), often),
    ]
    stranger = definite(draw_other(rng, pick(ANIMALS), noun))
    traps = [
        ask("who does", does=does, place=draw_other(rng, pick(OUTSIDE), place)),
        ask("who does", does=draw_other(rng, pick(HABITS), does), place=place),
        ask("where does", thing=stranger, do=do),
        ask("when does", thing=stranger, do=do),
    ]
    add_colour(facts, traps, noun, adjective)
    return close(fill("animal", what=what, does=does, place=place, often=often)), facts, traps


def taste(rng):
    """As in: The happy baker likes fish and rice, but not cheese."""
    full, who = subject(rng)
    drawn = rng.sample(TASTES, 4)
    no = ("", drawn[2][2], "", "")
    a, b, c, d = [(english, german, *others) for english, german, _, *others in drawn]
    both = fill("both", a=a, b=b)
    facts = [
        (ask("what likes", who=who), both),
        (ask("what dislikes", who=who), c),
        (ask("who likes", taste=a), full),
        (ask("who likes", taste=b), full),
    ]
    _, stranger = draw_other(rng, subject, (full, who))
    traps = [
        ask("what likes", who=stranger),
        ask("what dislikes", who=stranger),
        ask("who likes", taste=d),
        ask("who likes", taste=c),
    ]
    return close(fill("taste", full=full, both=both, no=no, c=c)), facts, traps


SHAPES = (deed, location, price, plan, travel, family, animal, taste)
WEIGHTS = (4, 2, 2, 2, 2, 2, 2, 2)


def split_of(english: str) -> str:
    """train, dev or test: decided by the sentence itself, so nothing made from it can mix them."""
    return {0: "dev", 1: "test"}.get(zlib.crc32(english.encode()) % 50, "train")


def example(rng: Random, split="train") -> tuple[Texts, list[tuple[Texts, Texts]], list[Texts]]:
    """A sentence of the split: its texts, facts as (question, answer), and traps as questions."""
    while True:
        shape = rng.choices(SHAPES, WEIGHTS)[0]
        text, facts, traps = shape(rng)
        if split_of(text[0]) == split:
            return text, [(asked, close(answer)) for asked, answer in facts], traps


def count_sentences() -> dict[str, int]:
    """Different sentences in a language, a lower bound: each shape's words multiplied."""
    subjects = len(NAMES) + len(PEOPLE) * len(CHARACTERS)
    things = len(OBJECTS) * len(COLOURS + QUALITIES)
    animals = len(ANIMALS) * len(COLOURS + ANIMAL_QUALITIES)
    tastes = len(TASTES) * (len(TASTES) - 1) * (len(TASTES) - 2)
    amounts = len(NUMBERS) + 1
    return {
        "deed": subjects * len(DEEDS) * things * amounts * (len(PAST) + len(PLACES)),
        "location": things * 2 * len(SPOTS) * len(ROOMS),
        "price": things * len(PRICES) * len(SHOPS),
        "plan": len(NAMES) * len(PLANS) * len(RELATIVES) * len(FUTURE),
        "travel": subjects * len(CITIES) * len(TRANSPORT) * len(MONTHS),
        "family": len(RELATIVES) * len(CITIES) * len(PEOPLE),
        "animal": animals * len(HABITS) * len(OUTSIDE) * len(OFTEN),
        "taste": subjects * tastes,
    }
