"""The laws of sampling, on distributions made by hand."""

import math

import pytest
import torch
from torch import Tensor

from gecko_lab.errors import LabError
from gecko_lab.generation import Chooser, Sampling, StopText
from gecko_lab.generation.sampling import distribution, draw, penalise

SHARES = [0.4, 0.1, 0.25, 0.05, 0.2]


def logits(shares: list[float]) -> Tensor:
    return torch.tensor([shares]).log()


def kept(probabilities: Tensor) -> set[int]:
    return {i for i, p in enumerate(probabilities[0].tolist()) if p > 0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.64}, {0, 2}),
        ({"top_p": 0.66}, {0, 2, 4}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.51}, {0, 2}),
        ({"min_p": 0.49}, {0, 2, 4}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # of 0.4 and 0.25, the first is 0.615 of what top-k left
        ({"top_k": 2, "top_p": 0.62}, {0, 2}),
        ({"temperature": 0.5, "top_p": 0.58}, {0}),  # squares: 0.16 of 0.275 is 0.582
        ({"temperature": 0.5, "top_p": 0.6}, {0, 2}),
        ({"temperature": 2.0, "min_p": 0.71}, {0, 2}),  # square roots: 0.2 is 0.707 of 0.4
        ({"temperature": 2.0, "min_p": 0.70}, {0, 2, 4}),
    ],
    ids=str,
)
def test_filters_keep_what_they_say(options: dict[str, float], expected: set[int]) -> None:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    probabilities = distribution(logits(SHARES), sampling)
    assert kept(probabilities) == expected
    wanted = torch.tensor(SHARES, dtype=torch.float64) ** (1 / sampling.temperature)
    wanted = torch.where(torch.tensor([i in expected for i in range(5)]), wanted, 0)
    torch.testing.assert_close(probabilities[0], wanted / wanted.sum(), atol=1e-6, rtol=1e-6)


def test_equally_likely_tokens_are_kept_from_the_lowest_id() -> None:
    assert kept(distribution(torch.zeros(1, 6), Sampling(top_k=2))) == {0, 1}
    assert kept(distribution(torch.zeros(1, 4), Sampling(top_p=0.5))) == {0, 1}


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    both = torch.cat([logits(SHARES), logits(SHARES[::-1])])
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)
    for row in (0, 1):
        assert torch.equal(distribution(both, sampling)[row], distribution(both[row : row + 1], sampling)[0])
    alone = Chooser(sampling, [7])
    beside = Chooser(sampling, [3, 7])
    for _ in range(50):
        assert alone.choose(both[1:]) == beside.choose(both)[1:]


def test_an_extreme_temperature_is_no_overflow() -> None:
    assert distribution(torch.tensor([[3e38, 2e38, -3e38]]), Sampling(temperature=1e-30)).tolist() == [[1, 0, 0]]
    flat = distribution(torch.tensor([[3.0, -2.0]]), Sampling(temperature=1e30))
    torch.testing.assert_close(flat, torch.tensor([[0.5, 0.5]], dtype=torch.float64))


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    for uniform, token in [(0.0, 1), (0.49, 1), (0.5, 3), (0.74, 3), (0.75, 4), (1 - 2**-32, 4)]:
        assert draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    count = 4000
    chooser = Chooser(Sampling(seed=0), range(count))
    tokens = chooser.choose(logits(SHARES).expand(count, -1))
    for token, share in enumerate(SHARES):
        assert abs(tokens.count(token) / count - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    seen = torch.tensor([[True, True, False, False, True]])
    given = penalise(torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]]), seen, 4.0)
    assert given.tolist() == [[0.5, -8.0, 2.0, -2.0, 0.0]]


def test_the_penalty_counts_what_was_chosen_but_never_bos() -> None:
    seen = torch.zeros(1, 3, dtype=torch.bool)
    chooser = Chooser(Sampling(temperature=0, repetition_penalty=2.0), [0], seen=seen, bos_id=2)
    scores = torch.tensor([[3.0, 2.0, 1.9]])
    assert [chooser.choose(scores)[0] for _ in range(3)] == [0, 1, 2]
    assert chooser.choose(scores) == [2]
    assert seen.tolist() == [[True, True, False]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_text(temperature: float) -> None:
    with pytest.raises(LabError, match="not finite"):
        Chooser(Sampling(temperature=temperature), [0]).choose(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.5), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("seed", -1)],
)  # fmt: skip
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(LabError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["END"], "an ENd and an EN", "an ENd and an EN"),
        (["aab"], "aaab", "a"),
        (["abcd", "bc"], "xabcd", "xa"),
        (["abc", "c"], "abc", ""),
        (["Q:"], "QQ:", "Q"),
        ([], "all of it", "all of it"),
    ],
)
def test_stop_strings_are_found_across_any_cut_and_never_shown(stops: list[str], text: str, shown: str) -> None:
    for size in (1, 2, 3, len(text)):
        stop, out = StopText(stops), ""
        for begin in range(0, len(text), size):
            out += stop.push(text[begin : begin + size])
            assert shown.startswith(out)  # nothing that must be taken back
            if stop.stopped:
                break
        out += "" if stop.stopped else stop.end()
        assert out == shown
        assert stop.stopped == (shown != text)
