"""What has a row for each token, under the names that transformers' architectures give it: all of it follows the
tokens that a merge adds, or the merge is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import load
from helpers.runs import quick_merge
from helpers.token_models import ARCHITECTURES, TEXT, save_pair

from hf_locstitch import plan_merge, verify
from hf_locstitch.errors import MismatchError

OLD, ALL = 24, 27
MOBILE = {**TEXT, "hidden_size": 16, "embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merge_loads_with_all_of_its_rows(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, name)
    quick_merge(base, tuned, out=tmp_path / "out", localizer={"density": 0.3})
    model, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == ALL
    got, own, theirs = (load(folder) for folder in (tmp_path / "out", base, tuned))
    resized = [key for key in own if own[key].shape != theirs[key].shape]
    assert resized
    for key in resized:
        axis = own[key].ndim - 1 if own[key].shape[0] == 1 else 0  # [1, tokens]
        due = torch.cat([own[key], theirs[key].narrow(axis, OLD, ALL - OLD)], axis)
        assert torch.equal(got[key], due), key
    assert verify(tmp_path / "out", base=base, finetuned=[tuned], tensors="all").ok


def test_a_head_that_has_tokens_along_its_columns(tmp_path: Path) -> None:
    """Refused: MobileBERT's is put together of the embedding and of this."""
    base, tuned = save_pair(tmp_path, "MobileBertForMaskedLM", **MOBILE)
    said = r"cls\.predictions\.dense\.weight is \[8, 24\], where transformers expects \[8, 27\] with 27 rows"
    with pytest.raises(MismatchError, match=said):
        plan_merge({"base": str(base), "finetuned": [str(tuned)]})
    quick_merge(base, tuned, out=tmp_path / "out", tokenizer="base", embeddings="base")
    _, report = transformers.MobileBertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["mismatched_keys"]


def test_a_bias_of_one_row_takes_part_in_a_method(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "BartForConditionalGeneration")
    quick_merge(base, tuned, out=tmp_path / "out", method="average")
    got, theirs = load(tmp_path / "out")["final_logits_bias"], load(tuned)["final_logits_bias"]
    assert torch.equal(got, theirs)
