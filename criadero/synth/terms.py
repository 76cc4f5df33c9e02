"""Whether a teacher's terms allow what is intended: asked before the first request, with the rules of `criadero.trust`."""

from __future__ import annotations

from criadero.artifact import Input
from criadero.errors import UserError
from criadero.synth.teacher import Teacher, TeacherFields, say
from criadero.trust.licence_graph import Graph, Node, passport_graph, read_graph
from criadero.trust.licence_names import read_licence
from criadero.trust.licence_rules import Intent
from criadero.trust.licences import evaluate

_REFUSED = {
    "output-ban": "forbid its answers to improve any model that is not made from {family}",
    "no-compete": 'forbid models that compete with it to be trained on its answers, and use is "shared"',
}


def check_terms(teacher: Teacher, recipe: TeacherFields) -> list[str]:
    """What the terms ask of a model that learns from the answers, in lines. UserError when they forbid it, or are unknown."""
    reading = read_licence(teacher.licence)
    if not reading.choices:
        near = next((f": did you mean {name!r}?" for _, name, _ in reading.unknown if name), "")
        raise UserError(
            f"{teacher.name}: the licence {teacher.licence!r} of its answers is not known{near or '; name one that criadero licence knows'}"
        )
    graph = learner(teacher.made_by, recipe.student)
    report = evaluate(graph, Intent(distribute=recipe.use == "shared", commercial=recipe.use == "shared"))
    # the walk reaches also what a local teacher was made of: a teacher tuned from Llama 2 answers under Llama 2's terms
    for finding in report.findings:
        if finding.severity == "conflict" and finding.rule in _REFUSED:
            why = _REFUSED[finding.rule].format(family="the same family")
            way_out = (
                "name such a model as --student, or choose another teacher"
                if finding.rule == "output-ban"
                else "with --use private they stay with you; or choose another teacher"
            )
            clause = f" ({finding.clause})" if finding.clause else ""
            raise UserError(
                f"{teacher.name}: the terms of {finding.source} ({finding.licence}){clause} {why}: {way_out}"
            )
    duties = [
        one for one in report.findings if one.rule in ("no-compete", "name-prefix", "use-policy", "output-ban-later")
    ]
    lines = sorted({f"{one.rule.replace('-', ' ')}: {one.licence} {one.clause}".strip() for one in duties})
    for line in lines:
        say(f"terms of {teacher.name}: {line}")
    return lines


def learner(made_by: Input, student: str) -> Graph:
    """The lineage of a model to come: tuned from `student` on a dataset of the teacher's answers."""
    nodes: dict[str, Node] = {}
    if made_by.ancestors:
        nodes |= passport_graph(made_by.ancestors[0], made_by.ancestors[1:]).nodes
    teacher = nodes.get(made_by.id)
    licences = tuple(filter(None, [made_by.licence])) or (teacher.licences if teacher else ())
    nodes[made_by.id] = Node(
        made_by.id, made_by.name, teacher.kind if teacher else "model", licences, teacher.inputs if teacher else ()
    )
    inputs = [("trained_on", "dataset")]
    if student and read_licence(student).choices:  # a model that is not here, by its licence: "llama2"
        nodes["student"] = Node("student", student, "model", (student,))
        inputs.append(("finetune_of", "student"))
    elif student:
        base = read_graph(student)
        nodes |= {id: node for id, node in base.nodes.items() if id not in nodes}
        inputs.append(("finetune_of", base.root))
    nodes["dataset"] = Node("dataset", "its answers", "dataset", (), (("outputs_of", made_by.id),))
    nodes["learner"] = Node("learner", "the model to come", "chat", (), tuple(inputs))
    return Graph("learner", nodes)
