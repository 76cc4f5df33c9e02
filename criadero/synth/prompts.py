"""Every prompt that a teacher is sent, in English and in Spanish. Written for this project.

A change here changes the requests: recorded answers no longer fit, and datasets that are made again are paid for again.
"""

# ruff: noqa: E501

# -- self_instruct: the conditions that Self-Instruct and Alpaca found to matter (variety of verbs and kinds, nothing that needs eyes
# or hands, short inputs, true answers)

TASKS = {
    "en": """You prepare exercises for an assistant that reads and writes text and can do nothing else. Below are {shown} examples. Write {wanted} new ones, numbered from {first} to {last}, in English.

Rules:
- No two may ask for the same thing, and none may repeat an example. Vary the verb, the subject and the kind: questions, rewriting, sorting, lists, short letters, ideas, explanations, small sums.
- Everyday language. Some are questions and some are orders, of one or two sentences.
- Nothing that needs pictures, sound, the internet, a file, a date of today, or a body.
- "Input" holds the material that the task works on, invented and concrete, at most 60 words. Write (none) when the task needs none.
- "Output" is the right and complete answer, at most 80 words.
- Keep to the form of the examples, with nothing before, between or after.
""",
    "es": """Preparas ejercicios para un asistente que lee y escribe texto y no puede hacer nada más. Abajo hay {shown} ejemplos. Escribe {wanted} nuevos, numerados del {first} al {last}, en español.

Reglas:
- No puede haber dos que pidan lo mismo, ni uno que repita un ejemplo. Cambia el verbo, el tema y la clase: preguntas, reescrituras, clasificaciones, listas, cartas cortas, ideas, explicaciones, cuentas sencillas.
- Lenguaje de todos los días. Unos son preguntas y otros órdenes, de una o dos frases.
- Nada que necesite imágenes, sonido, internet, un archivo, la fecha de hoy o un cuerpo.
- En «Entrada» va el material de la tarea, inventado y concreto, de 60 palabras como mucho. Escribe (ninguna) si la tarea no lo necesita.
- En «Respuesta» va la solución correcta y completa, de 80 palabras como mucho.
- Sigue la forma de los ejemplos, sin nada antes, en medio ni después.
""",
}
TASK_LABELS = {
    "en": ("Instruction", "Input", "Output", "(none)"),
    "es": ("Instrucción", "Entrada", "Respuesta", "(ninguna)"),
}

# -- evol_instruct: the operators of WizardLM's sections 3.1 and 3.2, and the judgement of its elimination (3.3)

EVOLVE_HOW = {
    "en": {
        "constraints": "Add one or two demands that its answer has to meet, such as a length, a form, an audience or something to avoid.",
        "deepening": "Ask about the same matter more deeply and more widely: its causes, its limits, what follows from it.",
        "concretising": "Put a particular case, with names, numbers or places, where it speaks in general.",
        "reasoning": "Change it so that it cannot be answered in one step, but only by several steps of thought that build on each other.",
        "input": "Add material that has to be worked on, such as a small table, a list, a letter, a dialogue or a piece of code, and make the task be about it.",
    },
    "es": {
        "constraints": "Añade una o dos exigencias que la respuesta deba cumplir, como una extensión, una forma, un público o algo que evitar.",
        "deepening": "Pregunta por lo mismo con más profundidad y amplitud: sus causas, sus límites, lo que se sigue de ello.",
        "concretising": "Pon un caso particular, con nombres, números o lugares, donde habla en general.",
        "reasoning": "Cámbialo para que no se pueda responder de una vez, sino solo con varios pasos de pensamiento que se apoyan unos en otros.",
        "input": "Añade material con el que haya que trabajar, como una tabla pequeña, una lista, una carta, un diálogo o un trozo de código, y haz que la tarea trate de él.",
    },
}
EVOLVE_DEPTH = {
    "en": """You make tasks for an assistant harder. Rewrite the task below so that a capable assistant has more to think about, while a person still understands it and it can still be answered.

How: {how}

Keep everything that the task gives, tables and code included. Add at most 20 words (material to work on does not count). Write only the new task, in English, without a title and without answering it.

<<<
{task}
>>>""",
    "es": """Haces más difíciles las tareas de un asistente. Reescribe la tarea de abajo de modo que un asistente capaz tenga más que pensar, pero una persona la siga entendiendo y se pueda responder.

Cómo: {how}

Conserva todo lo que la tarea da, también tablas y código. Añade 20 palabras como mucho (el material para trabajar no cuenta). Escribe solo la tarea nueva, en español, sin título y sin resolverla.

<<<
{task}
>>>""",
}
EVOLVE_BREADTH = {
    "en": """Below is a task for an assistant. Invent a quite different one of the same field: rarer, but about as long and as hard, understandable and answerable. Write only the new task, in English, without answering it.

<<<
{task}
>>>""",
    "es": """Abajo hay una tarea para un asistente. Inventa otra muy distinta del mismo campo: más rara, pero de largo y dificultad parecidos, que se entienda y se pueda responder. Escribe solo la tarea nueva, en español, sin resolverla.

<<<
{task}
>>>""",
}
SAME_TASK = {
    "en": """Here are two tasks. Are they the same, that is, do both set the same demands, and would the same answer, as deep and as wide, serve for both?

First:
<<<
{old}
>>>

Second:
<<<
{new}
>>>

Answer with one word: SAME or DIFFERENT.""",
    "es": """Aquí hay dos tareas. ¿Son iguales, es decir, exigen lo mismo las dos y valdría para ambas la misma respuesta, igual de profunda y de amplia?

Primera:
<<<
{old}
>>>

Segunda:
<<<
{new}
>>>

Responde con una palabra: IGUALES o DISTINTAS.""",
}

# -- document_questions

QUESTIONS = {
    "en": """Read the text between the marks. Write {wanted} that somebody may ask who has not seen it, and answer each from this text alone, in English.

{how}

Rules: a question names what it is about and never says "the text", "this" or "above". An answer is a whole sentence, at most {longest} words, says nothing that is not in the text, and keeps its names and numbers. Where the text answers no question, write NOTHING.

Form, for each:
Q: the question
A: the answer
{title}
<<<
{text}
>>>""",
    "es": """Lee el texto que hay entre las marcas. Escribe {wanted} que podría hacer alguien que no lo ha visto, y responde cada una solo con este texto, en español.

{how}

Reglas: una pregunta nombra aquello de lo que trata y nunca dice «el texto», «esto» ni «arriba». Una respuesta es una frase entera, de {longest} palabras como mucho, no dice nada que no esté en el texto, y conserva sus nombres y números. Si el texto no responde a ninguna pregunta, escribe NADA.

Forma, para cada una:
P: la pregunta
R: la respuesta
{title}
<<<
{text}
>>>""",
}
QUESTIONS_WANTED = {
    "en": ("one question", "{n} different questions"),
    "es": ("una pregunta", "{n} preguntas distintas"),
}
QUESTIONS_HOW = {
    "en": {
        "closed_qa": "Ask for facts: who, what, when, where, how much, why, how.",
        "information_extraction": "Ask for a list or a set of details that can be gathered from it.",
        "summarization": "Ask for what there is to know about its subject in short; the answer sums the text up.",
    },
    "es": {
        "closed_qa": "Pregunta por hechos: quién, qué, cuándo, dónde, cuánto, por qué, cómo.",
        "information_extraction": "Pide una lista o un conjunto de datos que se puedan reunir de él.",
        "summarization": "Pregunta qué hay que saber de su tema en pocas palabras; la respuesta resume el texto.",
    },
}
QUESTIONS_TITLE = {"en": "\nWhere it stands: {}\n", "es": "\nDónde está: {}\n"}
CONTEXT = {"en": "{question}\n\nContext:\n{text}", "es": "{question}\n\nContexto:\n{text}"}
HEADING_ASKED = {
    "en": ("What is there to know about {}?", "Tell me about {}.", "What do I need to know about {}?"),
    "es": ("¿Qué hay que saber sobre {}?", "Háblame de esto: {}.", "¿Qué me puedes decir sobre {}?"),
}

# -- judge

JUDGE_PAIR = {
    "en": """You judge two assistants that were asked the same. Which of them serves the person better? Look at whether an answer is right, does what was asked, is complete, and is clear. Neither length nor order counts.

{chat}

First give your reasons in a few sentences. Then write on the last line [[A]] if assistant A is better, [[B]] if B is better, or [[C]] if neither is.""",
    "es": """Juzgas a dos asistentes a los que se ha pedido lo mismo. ¿Cuál de los dos sirve mejor a la persona? Mira si una respuesta es correcta, hace lo que se pidió, es completa y es clara. Ni el largo ni el orden cuentan.

{chat}

Da primero tus razones en unas pocas frases. Escribe después en la última línea [[A]] si es mejor el asistente A, [[B]] si es mejor el B, o [[C]] si ninguno lo es.""",
}
JUDGE_SINGLE = {
    "en": """You mark an assistant's last answer, from 1 (useless) to 10 (could not be better). Look at whether it is right, does what was asked, is complete, and is clear.

{chat}

First give your reasons in a few sentences. Then write the mark on the last line as [[5]].""",
    "es": """Pones nota a la última respuesta de un asistente, de 1 (inútil) a 10 (no podría ser mejor). Mira si es correcta, hace lo que se pidió, es completa y es clara.

{chat}

Da primero tus razones en unas pocas frases. Escribe después la nota en la última línea, así: [[5]].""",
}
JUDGE_WORDS = {
    "en": ("Person", "Assistant", "An answer that is known to be right"),
    "es": ("Persona", "Asistente", "Una respuesta que se sabe correcta"),
}
