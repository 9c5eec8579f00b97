"""Wordings of the three instructions, at least ten a task and language, on which the demo's LLM is pretrained.

{to} and {in} are a target language as the wording needs it ("to German", "in German"), {question} a question.
"""

TARGETS = {
    "en": {"de": ("to German", "in German"), "it": ("to Italian", "in Italian"), "zh": ("to Chinese", "in Chinese")},
    "de": {"de": ("ins Deutsche", "auf Deutsch"), "it": ("ins Italienische", "auf Italienisch"),
           "zh": ("ins Chinesische", "auf Chinesisch")},
    "it": {"de": ("in tedesco", "in tedesco"), "it": ("in italiano", "in italiano"), "zh": ("in cinese", "in cinese")},
    "zh": {"de": ("德语", "德文"), "it": ("意大利语", "意大利文"), "zh": ("中文", "汉语")},
}
INSTRUCTIONS = {
    ("asr", "en"): [
        "Transcribe the English speech.", "Transcribe the audio.", "Write down what is said.",
        "What does the speaker say?",
        "Transcribe.", "Write the words of the recording.", "Give a transcript of the speech.",
        "Turn the speech into text.",
        "Please transcribe what you hear.", "Write out the English sentence you hear.",
        "Transcribe the English content.",
        "Repeat the spoken sentence in writing.", "Recognize the speech and write it down in English.",
    ],
    ("asr", "de"): [
        "Transkribiere die englische Sprachaufnahme.", "Transkribiere die Aufnahme.", "Schreibe auf, was gesagt wird.",
        "Was sagt die Stimme?", "Transkribiere.", "Schreibe den englischen Wortlaut auf.",
        "Gib den gesprochenen Text wieder.",
        "Wandle die Sprache in Text um.", "Bitte schreibe auf, was du hörst.",
        "Schreibe den gehörten Satz auf Englisch.",
        "Verschriftliche die Aufnahme.", "Wie lautet der gesprochene Satz?",
    ],
    ("asr", "it"): [
        "Trascrivi il parlato inglese.", "Trascrivi l'audio.", "Scrivi quello che viene detto.",
        "Che cosa dice la voce?",
        "Trascrivi.", "Scrivi le parole della registrazione.", "Fornisci la trascrizione del parlato.",
        "Trasforma il parlato in testo.", "Per favore, trascrivi quello che senti.",
        "Scrivi la frase inglese che senti.",
        "Trascrivi il contenuto in inglese.", "Qual è la frase pronunciata?",
    ],
    ("asr", "zh"): [
        "请转写这段英语语音。", "转写音频。", "写下所说的内容。", "说话人说了什么？", "请转写。", "写出录音里的话。", "给出语音的文字稿。",
        "把语音转成文字。", "请写下你听到的内容。", "写出你听到的英语句子。", "转录英语内容。", "听写这句话。",
    ],
    ("st", "en"): [
        "Translate {to}.", "Translate the English speech {to}.", "Translate the speech {to}.", "Say it {in}.",
        "What does the speaker say, {in}?", "Please translate what you hear {to}.", "Give the translation {in}.",
        "Write what is said {in}.", "Translate the audio {to}.", "How do you say this {in}?",
        "Render the English sentence {in}.", "Translate the English content {to}.", "Put the spoken sentence {in}.",
    ],
    ("st", "de"): [
        "Übersetze {to}.", "Übersetze die englische Sprache {to}.", "Übersetze die Aufnahme {to}.", "Sage es {in}.",
        "Was sagt die Stimme, {in}?", "Bitte übersetze das Gehörte {to}.", "Gib die Übersetzung {in}.",
        "Schreibe {in}, was gesagt wird.", "Übertrage den Satz {to}.", "Wie sagt man das {in}?",
        "Gib den englischen Satz {in} wieder.", "Übersetze den englischen Inhalt {to}.",
    ],
    ("st", "it"): [
        "Traduci {to}.", "Traduci il parlato inglese {to}.", "Traduci l'audio {to}.", "Dillo {in}.",
        "Che cosa dice la voce, {in}?", "Per favore, traduci {to} quello che senti.", "Dai la traduzione {in}.",
        "Scrivi {in} quello che viene detto.", "Traduci la frase {to}.", "Come si dice {in}?",
        "Rendi la frase inglese {in}.", "Traduci il contenuto inglese {to}.",
    ],
    ("st", "zh"): [
        "翻译成{to}。", "请把英语语音翻译成{to}。", "把音频翻译成{to}。", "用{in}说。", "用{in}说，说话人说了什么？", "请把你听到的翻译成{to}。",
        "给出{in}翻译。", "用{in}写下所说的内容。", "把这句话译成{to}。", "这用{in}怎么说？", "用{in}表达这个英语句子。", "将英语内容翻译成{to}。",
    ],
    ("sqa", "en"): [
        "Answer the question: {question}", "{question}", "Question: {question}", "Listen and answer: {question}",
        "Answer this question about the speech: {question}", "Please answer: {question}", "{question} Answer briefly.",
        "Answer the following question using the audio: {question}", "Based on the English speech, {question}",
        "According to the speaker: {question}", "Give a short answer in English. {question}", "Tell me: {question}",
        "Answer the following question concisely given the English content: {question}",
    ],
    ("sqa", "de"): [
        "Beantworte die Frage: {question}", "{question}", "Frage: {question}", "Höre zu und antworte: {question}",
        "Beantworte diese Frage zur Aufnahme: {question}", "Bitte antworte: {question}", "{question} Antworte kurz.",
        "Beantworte die folgende Frage anhand der Aufnahme: {question}", "Laut der englischen Sprache: {question}",
        "Gib eine kurze Antwort auf Deutsch. {question}", "Sage mir: {question}",
        "Beantworte die folgende Frage knapp anhand des englischen Inhalts: {question}",
    ],
    ("sqa", "it"): [
        "Rispondi alla domanda: {question}", "{question}", "Domanda: {question}", "Ascolta e rispondi: {question}",
        "Rispondi a questa domanda sul parlato: {question}", "Per favore, rispondi: {question}",
        "{question} Rispondi in breve.",
        "Rispondi alla seguente domanda usando l'audio: {question}", "Secondo il parlato inglese: {question}",
        "Dai una risposta breve in italiano. {question}", "Dimmi: {question}",
        "Rispondi in modo conciso alla seguente domanda dato il contenuto inglese: {question}",
    ],
    ("sqa", "zh"): [
        "回答问题：{question}", "{question}", "问题：{question}", "听后回答：{question}", "请回答关于这段语音的问题：{question}",
        "请回答：{question}", "{question}请简短回答。", "请根据音频回答下面的问题：{question}", "根据英语语音，{question}",
        "用中文简短回答。{question}", "告诉我：{question}", "根据所给的英语内容简要回答以下问题：{question}",
    ],
}


def draw_instruction(rng, task, target, question=""):
    """A random wording; target is the language of the answer and, for sqa, of the question. The instruction's own
    language is that of the question, else any of the four."""
    language = target if task == "sqa" else rng.choice(("en", "de", "it", "zh"))
    wording = rng.choice(INSTRUCTIONS[task, language])
    to, in_ = TARGETS[language].get(target, ("", ""))
    return wording.format_map({"to": to, "in": in_, "question": question})
