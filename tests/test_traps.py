"""Sixteen mistakes that trainers of language models have made, each with what holds it off here.

The table names the tests; those below it are the ones that have no better place. A test that is renamed has to be renamed here too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tiny
import torch

from criadero.chat import Template, builtin_template
from criadero.model import RMSNorm
from criadero.run import STAGES
from criadero.train import loss as losses
from criadero.train.examples import prepare
from criadero.train.sft import SftRecipe

HERE = Path(__file__).parent
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
        "test_traps.py::test_float16_is_not_offered",
        "test_loss.py::test_bfloat16_stays_close_to_float32",
        "test_optim.py::test_masters_keep_what_bfloat16_loses",
    ],
    "12 N steps, a kill and M more are N + M steps, to the bit": [
        "test_resume.py::test_kill_9_at_a_random_step_and_again",
        "test_tune_methods.py::test_cut_off_and_gone_on_with_ends_bit_for_bit_the_same",
        "test_pretrain.py::test_killed_and_gone_on_with_it_ends_as_if_unbroken",
        "test_resume.py::test_a_copied_folder_goes_on_elsewhere",
    ],
    "13 rewards at the last real token, margins, empty completions, KL of nothing": [
        "test_traps.py::test_no_stage_learns_from_preferences_yet",
    ],
    "14 a changed template is never met by chats that were prepared before": [
        "test_traps.py::test_a_changed_template_changes_the_examples",
        "test_distil.py::test_what_a_student_cannot_do",
    ],
    "15 tied tables on export, padded vocabularies, and text that spells a special token": [
        "test_checkpoints_hf.py::test_a_tied_model_that_stores_its_output_twice",
        "test_export.py::test_what_was_exported_is_the_same_model",
        "test_checkpoints_gguf.py::test_float32_round_trip",
        "test_chat.py::test_any_content_is_text",
        "test_tokenizer.py::test_special_text_is_text",
    ],
    "16 nothing is dropped or cut without being counted": [
        "test_batches.py::test_packing_loses_nothing_and_never_overfills",
        "test_batches.py::test_an_epoch_covers_the_stream_once",
        "test_sft.py::test_policies_for_long_chats_and_their_counts",
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


def test_float16_is_not_offered() -> None:
    """Its range needs a scaler of gradients, which skips steps; float32 and bfloat16 need none."""
    from criadero.errors import UserError
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
