"""What each finding says to a reader, in English and Spanish: rule -> language -> (reason, what to do).

``{licence}`` is the licence's title, ``{source}`` the input it comes from; the other names in braces are the finding's values.
Careful and short: what a text asks, not what a court would say.
"""

from __future__ import annotations

WORDS: dict[str, dict[str, tuple[str, str]]] = {
    "agreement": {
        "en": ("whoever gets this must get a copy of the {licence} with it", "put its text into LICENSES/"),
        "es": ("quien lo reciba debe recibir también una copia de la {licence}", "pon su texto en LICENSES/"),
    },
    "notice": {
        "en": ("a text file named Notice must hold the exact line: {text}", "write that line into a file Notice"),
        "es": (
            "un archivo de texto llamado Notice debe contener la línea exacta: {text}",
            "escribe esa línea en un archivo Notice",
        ),
    },
    "display": {
        "en": (
            '"{text}" must be shown on a page, in the interface or in the documentation',
            "put the words where users see them",
        ),
        "es": (
            "«{text}» debe verse en una página, en la interfaz o en la documentación",
            "ponlo donde lo vean los usuarios",
        ),
    },
    "name-prefix": {
        "en": (
            'the name of a model made with it must begin with "{text}"; this one is called "{name}"',
            'share it under a name that begins with "{text}": --name "{text}-{name}"',
        ),
        "es": (
            "el nombre de un modelo hecho con él debe empezar por «{text}»; este se llama «{name}»",
            'publícalo con un nombre que empiece por «{text}»: --name "{text}-{name}"',
        ),
    },
    "name-prefix-later": {
        "en": (
            'a model trained on these answers and shared must have a name that begins with "{text}"',
            "say so beside the data",
        ),
        "es": (
            "un modelo entrenado con estas respuestas, si se publica, debe llamarse empezando por «{text}»",
            "dilo junto a los datos",
        ),
    },
    "use-policy": {
        "en": ("it may only be used within the licence's acceptable use policy", "read the policy, and keep to it"),
        "es": (
            "solo puede usarse dentro de la política de uso aceptable de la licencia",
            "lee la política y respétala",
        ),
    },
    "restrictions": {
        "en": (
            "its limits on use go with it: those who get it from you are bound by them too",
            "share it under the same terms",
        ),
        "es": (
            "sus límites de uso van con él: quien lo reciba de ti también queda sujeto",
            "compártelo bajo los mismos términos",
        ),
    },
    "output-ban": {
        "en": (
            "answers of {source} were used to improve another model, which the {licence} forbids (only models made from it may learn "
            "from it)",
            "train without that data, or start from a model of the same version",
        ),
        "es": (
            "se usaron respuestas de {source} para mejorar otro modelo, y la {licence} lo prohíbe (solo pueden aprender de él los "
            "modelos hechos a partir de él)",
            "entrena sin esos datos, o parte de un modelo de la misma versión",
        ),
    },
    "output-ban-later": {
        "en": (
            "its answers may not be used to improve models that are not made from it",
            "keep its answers out of other training data",
        ),
        "es": (
            "sus respuestas no pueden usarse para mejorar modelos que no estén hechos a partir de él",
            "no pongas sus respuestas en datos de entrenamiento de otros modelos",
        ),
    },
    "second-hand": {
        "en": (
            "the model whose answers were used had itself learned from answers of {source}; the {licence} speaks of its own answers only",
            "nothing by its words; ask a lawyer if it matters",
        ),
        "es": (
            "el modelo cuyas respuestas se usaron había aprendido de respuestas de {source}; la {licence} solo habla de las suyas",
            "según su texto, nada; pregunta a un abogado si es importante",
        ),
    },
    "no-compete": {
        "en": (
            "it learned from answers that may not be used to develop models that compete with the service's owner",
            "train without that data, or ask whether your use competes",
        ),
        "es": (
            "aprendió de respuestas que no pueden usarse para desarrollar modelos que compitan con el dueño del servicio",
            "entrena sin esos datos, o pregunta si tu uso compite",
        ),
    },
    "no-compete-later": {
        "en": (
            "these answers may not be used to develop models that compete with the service's owner",
            "say so beside the data",
        ),
        "es": (
            "estas respuestas no pueden usarse para desarrollar modelos que compitan con el dueño del servicio",
            "dilo junto a los datos",
        ),
    },
    "mau": {
        "en": (
            "{users} people a month used your products in {month}, the month before it came out ({released}): above {limit} million the "
            "licence gives no rights until Meta grants them",
            "ask Meta for a licence",
        ),
        "es": (
            "{users} personas al mes usaban tus productos en {month}, el mes anterior a su salida ({released}): por encima de {limit} "
            "millones la licencia no da derechos hasta que Meta los conceda",
            "pide una licencia a Meta",
        ),
    },
    "mau-untested": {
        "en": (
            "only firms with more than {limit} million monthly users in {month} need to ask Meta; later growth does not count",
            "nothing, unless you are one; --mau {month}=NUMBER tests it",
        ),
        "es": (
            "solo las empresas con más de {limit} millones de usuarios al mes en {month} deben pedir permiso a Meta; crecer después "
            "no cuenta",
            "nada, si no eres una de ellas; --mau {month}=NÚMERO lo comprueba",
        ),
    },
    "mau-other-month": {
        "en": (
            "the test is made once, for {month} (it came out on {released}); users in {given} do not count",
            "--mau {month}=NUMBER tests it",
        ),
        "es": (
            "se mira una sola vez, en {month} (salió el {released}); los usuarios de {given} no cuentan",
            "--mau {month}=NÚMERO lo comprueba",
        ),
    },
    "region": {
        "en": (
            "its use policy gives no rights to the multimodal models to those established in the EU ({region}); people who only use "
            "a product that contains it are exempt",
            "use a version for text only, or a product of somebody outside the EU",
        ),
        "es": (
            "su política de uso no da derechos sobre los modelos multimodales a quien está establecido en la UE ({region}); quien solo "
            "usa un producto que lo contiene está exento",
            "usa una versión de solo texto, o un producto de alguien de fuera de la UE",
        ),
    },
    "region-unknown": {
        "en": (
            "its use policy excludes the EU ({region}) from the multimodal models, and nothing here says whether {source} is one",
            "find out whether it takes images; its passport's model.modalities would say so",
        ),
        "es": (
            "su política de uso excluye a la UE ({region}) de los modelos multimodales, y nada dice si {source} lo es",
            "averigua si admite imágenes; lo diría model.modalities en su pasaporte",
        ),
    },
    "region-untested": {
        "en": (
            "its use policy excludes those established in the EU from the multimodal models",
            "say where you are established: --region ES",
        ),
        "es": (
            "su política de uso excluye de los modelos multimodales a quien está establecido en la UE",
            "di dónde estás establecido: --region ES",
        ),
    },
    "attribution": {
        "en": (
            "its authors must be named, with the licence, where you share this",
            "name them in the README or in ATTRIBUTION.md",
        ),
        "es": (
            "hay que nombrar a sus autores, con la licencia, donde lo compartas",
            "nómbralos en el README o en ATTRIBUTION.md",
        ),
    },
    "changes": {
        "en": ("you must say that you changed it", "say in the README that it was made from {source}"),
        "es": ("hay que decir que se ha modificado", "di en el README que está hecho a partir de {source}"),
    },
    "keep-text": {
        "en": ("its licence text and notices must go along", "put its text into LICENSES/"),
        "es": ("su texto de licencia y sus avisos deben ir con él", "pon su texto en LICENSES/"),
    },
    "share-alike": {
        "en": ("what is made from it may be shared only under: {accepts}", "declare one of these"),
        "es": ("lo que se haga a partir de él solo puede compartirse bajo: {accepts}", "declara una de ellas"),
    },
    "share-alike-part": {
        "en": (
            "this part stays under its own licence, whatever the whole is under",
            "say so in the README, with its licence",
        ),
        "es": (
            "esta parte sigue bajo su propia licencia, sea cual sea la del conjunto",
            "dilo en el README, con su licencia",
        ),
    },
    "declared-share-alike": {
        "en": (
            "it is declared {declared}, but what is made from {source} may be shared only under: {accepts}",
            "declare one of these",
        ),
        "es": (
            "se declara {declared}, pero lo que se haga a partir de {source} solo puede compartirse bajo: {accepts}",
            "declara una de ellas",
        ),
    },
    "declared-looser": {
        "en": (
            "it is declared {declared}, which is freer than {source} allows: who reads the label would not know of the {licence}",
            "declare {id} (--licence {id})",
        ),
        "es": (
            "se declara {declared}, más libre de lo que permite {source}: quien lea la etiqueta no sabrá de la {licence}",
            "declara {id} (--licence {id})",
        ),
    },
    "file-of-another": {
        "en": (
            "{file} states {says}, but it is made from {source}, which is under the {licence}",
            "put the right text there",
        ),
        "es": (
            "{file} dice {says}, pero está hecho a partir de {source}, que está bajo la {licence}",
            "pon ahí el texto correcto",
        ),
    },
    "files-disagree": {
        "en": (
            "{file} states {says}, {file2} states {declared}",
            "find out which is right, and say the same everywhere",
        ),
        "es": (
            "{file} dice {says}, {file2} dice {declared}",
            "averigua cuál es la correcta y di lo mismo en todas partes",
        ),
    },
    "source-code": {
        "en": ("those who get it must be offered the source it was made from", "publish recipe and sources with it"),
        "es": (
            "a quien lo reciba hay que ofrecerle las fuentes de las que está hecho",
            "publica la receta y las fuentes con él",
        ),
    },
    "non-commercial": {
        "en": ("{source} may not be used commercially", "leave it out, or ask its owner"),
        "es": ("{source} no puede usarse comercialmente", "déjalo fuera, o pide permiso a su dueño"),
    },
    "no-derivatives": {
        "en": ("what is made from {source} may not be shared", "keep it to yourself, or leave it out"),
        "es": ("lo que se haga a partir de {source} no puede compartirse", "no lo compartas, o déjalo fuera"),
    },
    "no-sharing": {
        "en": ("{source} may be used, but not handed on", "leave it out of what you share"),
        "es": ("{source} puede usarse, pero no entregarse a otros", "no lo incluyas en lo que compartas"),
    },
    "no-permission": {
        "en": ("all rights in {source} are reserved: nothing allows its use here", "ask its owner, or leave it out"),
        "es": (
            "todos los derechos de {source} están reservados: nada permite usarlo aquí",
            "pide permiso a su dueño, o déjalo fuera",
        ),
    },
    "share-alike-clash": {
        "en": (
            "{source} asks for the same licence for the whole, and so does {other_source} ({other}): no licence satisfies both",
            "leave one of them out",
        ),
        "es": (
            "{source} pide su misma licencia para el conjunto, y {other_source} ({other}) también: ninguna cumple con las dos",
            "deja fuera una de las dos",
        ),
    },
    "share-alike-restricted": {
        "en": (
            "{source} lets nobody add restrictions to the whole, and {other_source} ({other}, clause {other_clause}) adds some",
            "leave one of them out",
        ),
        "es": (
            "{source} no deja que nadie añada restricciones al conjunto, y {other_source} ({other}, cláusula {other_clause}) las añade",
            "deja fuera una de las dos",
        ),
    },
    "clash": {
        "en": ("{source} and {other_source} ({other}) cannot be joined in one work", "leave one of them out"),
        "es": ("{source} y {other_source} ({other}) no pueden juntarse en una misma obra", "deja fuera una de las dos"),
    },
    "results-free": {
        "en": (
            "it frees what is computed from the data: the weights owe nothing",
            "the data themselves stay under it: hand them on with it",
        ),
        "es": (
            "deja libre lo que se calcule con los datos: los pesos no deben nada",
            "los datos mismos siguen bajo ella: entrégalos con ella",
        ),
    },
    "no-licence": {
        "en": (
            "nothing says under which licence {source} is",
            "find out, and name it where it is used (tune --licence own, if it is your work)",
        ),
        "es": (
            "nada dice bajo qué licencia está {source}",
            "averígualo y dilo donde se usa (tune --licence own, si es obra tuya)",
        ),
    },
    "unknown-licence": {
        "en": (
            "no licence of the name {text} is known{near_en}",
            "write its SPDX identifier, or own if it is your work",
        ),
        "es": (
            "no se conoce ninguna licencia llamada {text}{near_es}",
            "escribe su identificador SPDX, u own si es obra tuya",
        ),
    },
    "not-in-table": {
        "en": ("{text} is a licence on SPDX's list whose terms are not in the table here", "read it; decide by hand"),
        "es": ("{text} está en la lista de SPDX, pero sus términos no están en la tabla de aquí", "léela y decide tú"),
    },
    "unknown-relation": {
        "en": ('nobody knows what "{text}" means; it is taken as strictly as can be', "correct the passport's inputs"),
        "es": (
            "no se sabe qué significa «{text}»; se toma del modo más estricto",
            "corrige las entradas del pasaporte",
        ),
    },
    "missing-passport": {
        "en": (
            "the passport of {source} is missing from lineage.jsonl: what it was made of cannot be told",
            "make the artifact again",
        ),
        "es": (
            "falta el pasaporte de {source} en lineage.jsonl: no se sabe de qué está hecho",
            "haz de nuevo el artefacto",
        ),
    },
    "no-passport": {
        "en": (
            "the folder has no passport: what it was made of cannot be told, only what its files state",
            "ask its makers",
        ),
        "es": (
            "la carpeta no tiene pasaporte: no se sabe de qué está hecha, solo lo que dicen sus archivos",
            "pregunta a quien la hizo",
        ),
    },
    "undeclared": {
        "en": (
            "it is to be shared, and no licence is declared: who gets it cannot know what is allowed",
            "declare one: --licence NAME",
        ),
        "es": (
            "se va a compartir y no se declara licencia: quien lo reciba no sabrá qué le está permitido",
            "declara una: --licence NOMBRE",
        ),
    },
    "choice": {
        "en": ("it may be taken under any of {text}; {taken} is taken, which asks least", ""),
        "es": ("puede tomarse bajo cualquiera de {text}; se toma {taken}, la que menos pide", ""),
    },
    "exception": {
        "en": ("the exception {text} is not looked at: the licence is taken without it, which asks no less", ""),
        "es": ("la excepción {text} no se mira: se toma la licencia sin ella, que no pide menos", ""),
    },
    "read-from": {
        "en": ("no passport records the licence of {source}; its folder {folder} states {says}", ""),
        "es": ("ningún pasaporte recoge la licencia de {source}; su carpeta {folder} dice {says}", ""),
    },
    "read-as": {
        "en": ('"{text}" was read as {read}', "write an SPDX expression, if that is not what is meant"),
        "es": ("«{text}» se ha leído como {read}", "escribe una expresión SPDX, si no es eso lo que significa"),
    },
}

# prefix of a note that would bind with another --data-effect, or with --distribute
UNSETTLED = {
    "en": "if training data bind the weights: ",
    "es": "si los datos de entrenamiento obligan a los pesos: ",
}

HEADS = {
    "conflict": {"en": "Conflicts", "es": "Conflictos"},
    "unknown": {"en": "Not known", "es": "No se sabe"},
    "duty": {"en": "To do", "es": "Por hacer"},
    "done": {"en": "Done", "es": "Hecho"},
    "note": {"en": "To know", "es": "Para saber"},
}

PHRASES = {
    "asked": {"en": "asked", "es": "se pregunta"},
    "commercial": {"en": "commercial", "es": "comercial"},
    "not commercial": {"en": "not commercial", "es": "no comercial"},
    "shared": {"en": "shared with others", "es": "se comparte"},
    "kept": {
        "en": "kept to yourself (--distribute asks about sharing)",
        "es": "no se comparte (--distribute pregunta por compartirlo)",
    },
    "region": {"en": "established in", "es": "establecido en"},
    "product": {"en": "got inside a product", "es": "recibido dentro de un producto"},
    "data": {"en": "training data", "es": "datos de entrenamiento"},
    "clause": {"en": "clause", "es": "cláusula"},
    "from": {"en": "from", "es": "de"},
    "fix": {"en": "do", "es": "haz"},
    "fix it": {"en": "--fix writes it", "es": "--fix lo escribe"},
    "fix text": {"en": "--fix does, if the text is at hand", "es": "--fix lo pone, si tiene el texto a mano"},
    "declared": {"en": "declared", "es": "declarada"},
    "nothing": {"en": "nothing", "es": "ninguna"},
}

RELATIONS = {  # in Spanish; in English they are what the passport says
    "finetune_of": "ajustado a partir de",
    "trained_on": "entrenado con",
    "trained_on_outputs_of": "entrenado con respuestas de",
    "outputs_of": "respuestas de",
    "generated_by": "respuestas de",
    "distilled_from": "destilado de",
    "merged_from": "mezclado de",
    "quantised_from": "cuantizado de",
    "converted_from": "convertido de",
    "tokenizer_of": "con el tokenizador",
    "code_of": "con el código",
    "contains": "contiene",
}

EFFECTS = {
    "none": {
        "en": "their licences are taken not to bind the weights (--data-effect none)",
        "es": "se supone que sus licencias no obligan a los pesos (--data-effect none)",
    },
    "attribution": {
        "en": "credit is taken to be owed, the rest only told (--data-effect attribution)",
        "es": "se supone que hay que citarlos, y lo demás solo se dice (--data-effect attribution)",
    },
    "careful": {
        "en": "their licences are taken to bind the weights (--data-effect careful)",
        "es": "se supone que sus licencias obligan a los pesos (--data-effect careful)",
    },
}

VERDICTS = {
    "ok": {"en": "nothing is owed", "es": "no se debe nada"},
    "duties": {"en": "in order, with the duties below", "es": "en orden, con los deberes de abajo"},
    "conflict": {"en": "conflict: do not share or use it like this", "es": "conflicto: no lo compartas ni lo uses así"},
    "unknown": {"en": "not known: find out before you share it", "es": "no se sabe: averígualo antes de compartirlo"},
}

DISCLAIMER = {
    "en": "Read from licence texts by rules; no legal advice. Whether training data bind a model is not settled law.",
    "es": "Leído de los textos por reglas; no es asesoría legal. No hay derecho asentado sobre si los datos obligan al modelo.",
}
