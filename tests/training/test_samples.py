"""What a model reads: windows, documents kept apart, padding, PoSE, and an order that depends on nothing but the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longspan.positions.pose import PoSE
from longspan.training.data import Tokens
from longspan.training.samples import (
    IGNORE,
    Course,
    Mixture,
    TextWindows,
    Validation,
    check_enough,
    collate,
    labelled_share,
)
from longspan.util.errors import SpecError

ENDS = np.array([5, 12, 13, 40])
TOKENS = Tokens(np.arange(40, dtype=np.uint16), ENDS, "")


def windows(packing: Any, length: int = 8, **more: Any) -> TextWindows:
    return TextWindows(TOKENS, length, packing, 99, **more)


def test_plain_windows_follow_one_another() -> None:
    made = windows("plain")
    assert len(made) == 4
    for i in range(4):
        sample = made.sample(i, 0)
        assert set(sample) == {"input_ids", "labels"}
        assert (sample["input_ids"] == np.arange(8 * i, 8 * i + 8)).all()
        assert (sample["labels"] == sample["input_ids"] + 1).all()


def test_boundaries_start_positions_anew_and_predict_nothing_across() -> None:
    first, second = (windows("boundaries").sample(i, 0) for i in (0, 1))
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert first["labels"].tolist() == [1, 2, 3, 4, IGNORE, 6, 7, 8]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]  # it starts within a document
    assert second["labels"].tolist() == [9, 10, 11, IGNORE, IGNORE, 14, 15, 16]
    assert "attention_mask" not in first


def test_one_window_a_document_is_padded_and_masked() -> None:
    made = windows("none")
    assert len(made) == 3  # a document of one token has nothing to predict
    short, long = made.sample(0, 0), made.sample(2, 0)
    assert short["input_ids"].tolist() == [0, 1, 2, 3, 4, 99, 99, 99]
    assert short["labels"].tolist() == [1, 2, 3, 4, *[IGNORE] * 4]
    assert short["attention_mask"].tolist() == [1] * 5 + [0] * 3
    assert long["input_ids"].tolist() == list(range(13, 21)) and long["labels"].tolist() == list(range(14, 22))


@pytest.mark.parametrize("packing", ["plain", "none"])
def test_pose_reads_on_from_its_window_and_brings_a_mask_of_ones(packing: str) -> None:
    made = windows(packing, 6, pose=PoSE(6, 100))
    assert len(made) == (6 if packing == "plain" else 2)  # the documents of more than six tokens
    for i in range(len(made)):
        sample = made.sample(i, 3)
        start = 6 * i if packing == "plain" else (5, 13)[i]
        assert sample["input_ids"][0] == start and sample["attention_mask"].tolist() == [1] * 6
        assert (sample["labels"][:-1] == sample["input_ids"][1:]).all() and (sample["labels"] != IGNORE).all()
        assert sample["position_ids"][0] == 0 and sample["position_ids"].max() < 100


def test_pose_is_drawn_anew_in_every_epoch() -> None:
    made = windows("plain", 8, pose=PoSE(8, 1000))
    assert (made.sample(1, 0)["position_ids"] == made.sample(1, 0)["position_ids"]).all()
    assert len({tuple(made.sample(1, e)["position_ids"]) for e in range(5)}) == 5


def test_a_course_goes_through_everything_once_an_epoch_in_another_order() -> None:
    course = Course(windows("plain"), 10, seed=3)
    starts = [int(course[i]["input_ids"][0]) for i in range(10)]
    assert sorted(starts[:4]) == sorted(starts[4:8]) == [0, 8, 16, 24]
    assert starts[:4] != starts[4:8]
    again = Course(windows("plain"), 10, seed=3)
    assert [int(again[i]["input_ids"][0]) for i in (9, 2, 5)] == [starts[9], starts[2], starts[5]]
    assert [int(Course(windows("plain"), 8, seed=4)[i]["input_ids"][0]) for i in range(8)] != starts[:8]


def test_validation_is_spread_evenly() -> None:
    made = Validation(windows("plain", 4), 3)
    assert [int(made[i]["input_ids"][0]) for i in range(len(made))] == [0, 16, 32]
    assert len(Validation(windows("plain"), 100)) == 4


def test_too_little_text_is_refused() -> None:
    with pytest.raises(SpecError, match="too few for data"):
        check_enough(windows("plain", 64), "data.train", 64, 40)


def test_batches_are_integers_of_one_shape() -> None:
    batch = collate([windows("none").sample(i, 0) for i in range(3)])
    assert all(batch[k].shape == (3, 8) and batch[k].dtype == torch.int64 for k in ("input_ids", "attention_mask"))
    assert set(batch) == {"input_ids", "labels", "attention_mask", "labelled"}
    assert batch["labelled"].tolist() == [0, 1, 2, 3, *range(8, 14), *range(16, 24)]
    assert "labelled" not in collate([windows("plain").sample(i, 0) for i in range(3)])  # each place has a label
    assert labelled_share(Validation(windows("none"), 3), 2) == 10 / 16


def test_what_is_read_leaves_padding_out() -> None:
    apart = windows("none")
    order = np.random.default_rng((3, 0)).permutation(3), np.random.default_rng((3, 1)).permutation(3)
    held = [int(apart.sample(int(i), 0)["attention_mask"].sum()) for part in order for i in part]
    course = Course(apart, 6, seed=3)
    assert course.read(0, 6).tolist() == held and course.read(2, 5).tolist() == held[2:5]
    assert sorted(held[:3]) == [5, 7, 8] and course.read(4, 4).tolist() == []
    assert [course[i]["attention_mask"].sum() for i in range(6)] == held
    assert Course(windows("plain"), 9, seed=3).read(1, 9).tolist() == [8] * 8
    short = TextWindows(Tokens(np.arange(100, 116), np.array([3, 9, 16]), ""), 8, "none", 99)
    mixed = Mixture(windows("plain"), short, 1 / 3)  # whose samples of the task have no mask
    assert [mixed.read(np.array([0, 4, 5]), epoch).tolist() for epoch in (0, 1)] == [[8, 3, 6], [8, 7, 3]]


def test_of_a_task_only_the_answer_is_learned() -> None:
    learned = np.isin(TOKENS.ids, [3, 4, 10, 11])
    made = TextWindows(Tokens(TOKENS.ids, ENDS, "", learned), 30, "none", 99)
    first, second = made.sample(0, 0), made.sample(1, 0)
    assert first["labels"].tolist() == [IGNORE, IGNORE, 3, 4, *[IGNORE] * 26]
    assert second["labels"][:7].tolist() == [*[IGNORE] * 4, 10, 11, IGNORE]


LEARNED = Tokens(np.arange(100, 140, dtype=np.uint16), ENDS, "", np.arange(40) % 2 == 0)


def test_a_task_with_pose_keeps_its_tokens_and_answers() -> None:
    task = TextWindows(LEARNED, 8, "none", 99, pose=PoSE(8, 100))
    assert len(task) == 3  # short ones too
    first, again = task.sample(0, 0), task.sample(0, 1)
    assert first["input_ids"].tolist() == [100, 101, 102, 103, 104, 99, 99, 99]
    assert first["labels"].tolist() == [IGNORE, 102, IGNORE, 104, *[IGNORE] * 4]
    assert first["attention_mask"].tolist() == [1] * 8
    assert (np.diff(first["position_ids"]) >= 1).all() and first["position_ids"].max() < 100
    assert first["position_ids"].tolist() != again["position_ids"].tolist()
    plain = TextWindows(LEARNED, 8, "none", 99, pose=PoSE(8, 100, skips=False)).sample(0, 0)
    assert plain["position_ids"].tolist() == list(range(8))


@pytest.mark.parametrize("pose", [None, PoSE(8, 100)])
def test_a_task_mixed_into_a_text(pose: PoSE | None) -> None:
    text, task = windows("plain", pose=pose), TextWindows(LEARNED, 8, "none", 99, pose=pose)
    mixed = Mixture(text, task, 1 / 3)
    assert len(text) == 4 and len(mixed) == 6
    batch = collate([mixed.sample(i, 0) for i in range(6)])
    assert set(batch) == {*text.sample(0, 0), "labelled"}
    assert [int(row[0]) >= 100 for row in batch["input_ids"]] == [False] * 4 + [True] * 2
    begins = [int(mixed.sample(i, epoch)["input_ids"][0]) for epoch in range(3) for i in (4, 5)]
    assert begins == [100, 105, 113, 100, 105, 113]  # all of the task, then again
