"""Sixteen mistakes that trainers of language models have made, each with what holds it off here.

The table names the tests; those below it are the ones that have no better place. A test that is renamed has to be renamed here too.
Of the first, what ranks would get wrong is not tested: there is one process. Of the thirteenth nothing is: no stage learns from
preferences, and a test sees to it that this is said here.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero.chat import Template, builtin_template
from criadero.checkpoints import load_model, save_hf, template_of, tokenizer_of
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.export import export
from criadero.model import DocumentMask, RMSNorm, causal
from criadero.run import STAGES, make
from criadero.train import loss as losses
from criadero.train.examples import prepare
from criadero.train.optim import Optimizer
from criadero.train.sft import SftRecipe, sft

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {"dtype": "float32", "epochs": 5.0, "batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}
TRAPS = {
    "01 gradient accumulation is one large batch, weighted by tokens": [
        "test_train_loop.py::test_accumulation_is_one_large_batch_token_weighted",
        "test_optim.py::test_gradients_are_summed_divided_once_and_cleared",
    ],
    "02 every assistant turn and its end is learned, nothing else": [
        "test_chat.py::test_golden_text_and_mask",
        "test_chat.py::test_prompts_are_prefixes_and_masks_are_answers",
        "test_sft.py::test_a_template_that_masks_everything_is_refused",
        "test_sft.py::test_train_on_last_learns_only_the_last_answer",
    ],
    "03 masks come from ids and offsets, never from text that is encoded twice": [
        "test_chat.py::test_tokens_that_swallow_white_space",
        "test_chat.py::test_metaspace_tokenizers",
        "test_chat.py::test_content_that_holds_the_marks",
    ],
    "04 padding that is also the end token does not hide the end": [
        "test_batches.py::test_a_padding_token_that_is_also_a_real_one_is_learned_where_it_is_real",
        "test_traps.py::test_a_model_whose_padding_is_its_end_learns_to_end",
    ],
    "05 BOS is there once": ["test_chat.py::test_bos_is_there_once", "test_chat.py::test_ids_are_those_of_transformers"],
    "06 a batch in which nothing is learned": [
        "test_train_loop.py::test_a_step_with_nothing_to_learn_is_refused",
        "test_train_loop.py::test_a_micro_batch_with_nothing_to_learn_changes_nothing",
        "test_sft.py::test_runs_in_which_nothing_would_be_learned_are_refused",
    ],
    "07 packing changes nothing": [
        "test_loss.py::test_packed_rows_equal_each_document_alone",
        "test_loss.py::test_gradients_of_packed_rows_equal_the_sum_over_documents",
        "test_batches.py::test_no_loss_crosses_a_border_and_positions_restart",
        "test_model.py::test_packing_without_the_mask_is_noticed",
        "test_train_fast.py::test_no_gradient_crosses_a_document",
    ],
    "08 the order of rotary rows survives Meta, Hugging Face and GGUF, with grouped heads": [
        "test_checkpoints_meta.py::test_interleaved_rotation_is_the_same_rotation",
        "test_checkpoints_meta.py::test_round_trip",
        "test_checkpoints_gguf.py::test_transformers_reads_our_files",
        "test_golden.py::test_golden_200_tokens",
    ],
    "09 grouped heads in order; decoding equals the whole forward; padding changes nothing": [
        "test_model.py::test_logits_equal_transformers",
        "test_model.py::test_cached_decoding_equals_the_full_forward",
        "test_model.py::test_left_padding_changes_nothing",
        "test_model.py::test_right_padding_changes_nothing",
    ],
    "10 an adapter starts as nothing, is scaled as it says, and merges as it computes": [
        "test_lora.py::test_an_attached_adapter_changes_nothing_at_first_and_only_it_learns",
        "test_lora.py::test_the_scale_is_alpha_over_rank_or_over_its_root",
        "test_lora.py::test_merged_equals_unmerged",
        "test_lora.py::test_dora_starts_as_the_base_and_merges",
        "test_tune_data.py::test_an_adapter_is_folded_into_its_quantised_base",
    ],
    "11 norms, softmax and cross-entropy are computed in float32; no float16": [
        "test_traps.py::test_norms_and_losses_are_computed_in_float32",
        "test_traps.py::test_attention_over_many_tokens_is_summed_in_float32",
        "test_traps.py::test_float16_is_not_offered",
        "test_loss.py::test_bfloat16_stays_close_to_float32",
        "test_optim.py::test_masters_keep_what_bfloat16_loses",
    ],
    "12 N steps, a kill and M more are N + M steps, to the bit": [
        "test_resume.py::test_kill_9_at_a_random_step_and_again",
        "test_resume.py::test_moments_matter_to_how_a_run_goes_on",
        "test_tune_methods.py::test_kill_9_in_the_middle_of_tuning_and_again",
        "test_tune_methods.py::test_cut_off_and_gone_on_with_ends_bit_for_bit_the_same",
        "test_pretrain.py::test_killed_and_gone_on_with_it_ends_as_if_unbroken",
        "test_resume.py::test_a_copied_folder_goes_on_elsewhere",
    ],
    "13 rewards at the last real token, margins, empty completions, KL of nothing": [
        "test_traps.py::test_no_stage_learns_from_preferences_yet",
    ],
    "14 a changed template is never met by chats that were prepared before": [
        "test_traps.py::test_a_changed_template_changes_the_examples",
        "test_traps.py::test_a_lesson_keeps_the_template_that_its_chats_were_rendered_with",
        "test_traps.py::test_an_unfinished_run_does_not_go_on_with_another_template",
    ],
    "15 tied tables on export, padded vocabularies, and text that spells a special token": [
        "test_checkpoints_hf.py::test_a_tied_model_that_stores_its_output_twice",
        "test_export.py::test_what_was_exported_is_the_same_model",
        "test_checkpoints_gguf.py::test_float32_round_trip",
        "test_traps.py::test_rows_beyond_the_vocabulary_stay_and_are_never_said",
        "test_chat.py::test_any_content_is_text",
        "test_tokenizer.py::test_special_text_is_text",
    ],
    "16 nothing is dropped or cut without being counted": [
        "test_batches.py::test_packing_loses_nothing_and_never_overfills",
        "test_batches.py::test_an_epoch_covers_the_stream_once",
        "test_sft.py::test_policies_for_long_chats_and_their_counts",
        "test_sft.py::test_held_out_chats_that_are_cut_are_counted",
        "test_tune_data.py::test_long_chats_are_split_between_rounds_and_counted",
        "test_tune_data.py::test_every_token_of_a_document_is_learned_once",
    ],
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_tests(trap: str) -> None:
    for name in TRAPS[trap]:
        file, _, test = name.partition("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_a_model_whose_padding_is_its_end_learns_to_end(tmp_path: Path) -> None:
    """End to end: rows are padded with the token that ends an answer, and the tuned model still says it."""
    base, end = tiny.base(tmp_path / "base", intermediate_size=64), tiny.tokenizer().special["<|end|>"]
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<|end|>"}))
    assert tokenizer_of(base).pad_id == end
    recipe = SftRecipe(str(base), str(tiny.write_chats(tmp_path / "shop.jsonl", 40)), **QUICK)
    llm = LLM(sft(recipe, tmp_path / "tuned").path)
    answer = llm.answer([{"role": "user", "content": "Question 3?"}], max_tokens=60)
    assert (answer.text, answer.finish_reason) == ("Yes, we are open on Sundays.", "stop")


def test_norms_and_losses_are_computed_in_float32() -> None:
    """Sums over thousands of bfloat16 numbers in bfloat16 stop growing at 256; in float32 they do not."""
    norm = RMSNorm(8192, 1e-6)
    x = torch.full((1, 8192), 3.0, dtype=torch.bfloat16)
    torch.testing.assert_close(norm.to(torch.bfloat16)(x), torch.ones_like(x))
    hidden = torch.zeros(4096, 8, dtype=torch.bfloat16)
    weight = torch.zeros(5000, 8, dtype=torch.bfloat16)
    value = losses.cross_entropy_sum(hidden, weight, torch.zeros(4096, dtype=torch.int64))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.log(torch.tensor(5000.0)) * 4096, rtol=1e-5, atol=0)
    large = torch.full((4, 8), 1e4, dtype=torch.bfloat16)  # logits beyond what float16 holds
    value = losses.cross_entropy_sum(large, torch.eye(8, dtype=torch.bfloat16) * 100, torch.arange(4))
    assert torch.isfinite(value)


@pytest.mark.parametrize("length", [1024, 4096])
def test_attention_over_many_tokens_is_summed_in_float32(length: int) -> None:
    """The last of many tokens that are all alike sees the mean of what is there; a sum in bfloat16 would stop at 256 of them."""
    q = k = torch.zeros(1, 2, length, 8, dtype=torch.bfloat16)
    v = torch.ones_like(k)
    segments = torch.zeros(1, length, dtype=torch.int64)
    ways = [causal, DocumentMask(segments)] + (
        [losses.BlockAttention(segments, torch.bfloat16)] if length == 1024 else []
    )
    for attend in ways:
        torch.testing.assert_close(attend(0, q, k, v)[0, :, -1].float(), torch.ones(2, 8), rtol=2e-2, atol=0)


def test_float16_is_not_offered() -> None:
    """Its range needs a scaler of gradients, which skips steps; float32 and bfloat16 need none."""
    from criadero.recipe import parse

    with pytest.raises(UserError, match="dtype"):
        parse(SftRecipe, {"base": "b", "data": "d", "dtype": "float16"}, where="test")


def test_no_stage_learns_from_preferences_yet() -> None:
    """Who adds such a stage writes the tests of trap 13 and names them in the table."""
    assert not {"reward", "dpo", "ppo", "grpo"} & set(STAGES)


def test_a_changed_template_changes_the_examples(tmp_path: Path) -> None:
    """Chats are rendered in every run, so there is nothing that could be stale."""
    data, words = tiny.write_chats(tmp_path / "shop.jsonl", 4), tiny.tokenizer()
    recipe = SftRecipe(base="", data=str(data), held_out_share=0.0)
    plain = builtin_template("criadero")
    changed = Template(plain.source.replace("{{- bos_token -}}", "{{- bos_token -}}{{- 'Shop. ' -}}", 1), "changed")
    before, after = (prepare(recipe, data, words, template, 128).train for template in (plain, changed))
    assert changed.source != plain.source
    assert [one.ids for one in before] != [one.ids for one in after]
    assert [one.ids for one in before] == [one.ids for one in prepare(recipe, data, words, plain, 128).train]


def test_a_lesson_keeps_the_template_that_its_chats_were_rendered_with(tmp_path: Path) -> None:
    """The one place where rendered chats are kept: a student with another template learns, and is sealed with, the lesson's."""
    for name, template in (("teacher", "criadero"), ("student", "alpaca")):
        tiny.base(tmp_path / name, template=template)
    data = str(tiny.write_chats(tmp_path / "shop.jsonl", 8))
    make(
        "logits",
        {"teacher": str(tmp_path / "teacher"), "data": data, "top_k": 4, "dtype": "float32"},
        tmp_path / "lesson",
    )
    recipe = SftRecipe(str(tmp_path / "student"), str(tmp_path / "lesson"), **QUICK | {"epochs": 1.0})
    made = sft(recipe, tmp_path / "pupil").path
    assert (
        template_of(made).source == template_of(tmp_path / "teacher").source != template_of(tmp_path / "student").source
    )


@pytest.mark.parametrize("what", ["template", "data"])
def test_an_unfinished_run_does_not_go_on_with_another_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Half of its steps would have seen other examples than the other half; the same holds for other data."""
    base, data = tiny.base(tmp_path / "base"), tiny.write_chats(tmp_path / "shop.jsonl", 8)
    recipe = SftRecipe(str(base), str(data), **QUICK | {"save_minutes": 1e-9})
    original, steps = Optimizer.step, []

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> float:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        sft(recipe, tmp_path / "x")
    changed = base / "chat_template.jinja" if what == "template" else data
    changed.write_text(changed.read_text().replace("Question 3", "Query 3") + ("" if what == "data" else "{# new #}"))
    with pytest.raises(
        UserError,
        match=f"{changed.parent.name if what == 'template' else data.name} has changed since .*x.partial was left",
    ):
        sft(recipe, tmp_path / "x")


@pytest.mark.parametrize("tied", [True, False])
def test_rows_beyond_the_vocabulary_stay_and_are_never_said(tmp_path: Path, tied: bool) -> None:
    """Tables are padded to round numbers: 20 rows more than there are tokens."""
    words = tiny.tokenizer()
    base = tiny.base(tmp_path / "base", vocab_size=words.vocab_size + 20, tie_word_embeddings=tied)
    recipe = SftRecipe(
        str(base), str(tiny.write_chats(tmp_path / "shop.jsonl", 8)), **QUICK | {"epochs": 1.0, "merged": True}
    )
    made = sft(recipe, tmp_path / "tuned").path
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = load_model(made).float()(ids)
    assert wanted.shape[-1] == words.vocab_size + 20
    for to in ("hf", "gguf"):
        where = export(made, to=to, out=tmp_path / f"{to}", type="f32")
        found = load_model(getattr(where, "path", where)).float()
        assert found.config.vocab_size == words.vocab_size + 20
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
        with torch.no_grad():
            torch.testing.assert_close(found(ids), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model = load_model(made)
        table = model.lm_head.weight
        table[words.vocab_size :] = table[: words.vocab_size].mean(0) * 50  # loud, where they are likeliest
        save_hf(model, model.config, made)
    said = LLM(made).answer([{"role": "user", "content": "Question 3?"}], max_tokens=20)
    assert max(said.ids) < words.vocab_size
