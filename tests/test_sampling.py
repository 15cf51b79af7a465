"""Samplers against brute-force references; generation against the model called by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.sampling import CharacterStream, Sampling, generate, keep_top_k, keep_top_p, sample
from gpt2_xla.tokenizer import ByteTokenizer

torch.set_num_threads(1)  # on a busy machine, threads that share tiny matrices wait for one another: 10 times slower

# Quarters give many ties; the range reaches probabilities that vanish in float32.
LOGITS = st.lists(st.integers(-160, 160).map(lambda n: n / 4), min_size=1, max_size=20)


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


@given(LOGITS, st.integers(1, 30))
def test_top_k_keeps_the_k_largest_and_their_equals(values, k):
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1]
    filtered = keep_top_k(torch.tensor(values), k)
    assert kept(filtered) == {i for i, v in enumerate(values) if v >= threshold}
    assert all(filtered[i] == values[i] for i in kept(filtered))


@given(LOGITS, st.floats(0.001, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(values, p):
    weights = [math.exp(v - max(values)) for v in values]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    nucleus, reached = [], 0.0
    for i in order:
        nucleus.append(i)
        reached += weights[i] / sum(weights)
        if abs(reached - p) < 1e-5:
            return  # float32 may fall on either side
        if reached >= p:
            break
    if p < 1:
        assert kept(keep_top_p(torch.tensor(values), p)) == set(nucleus)


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept(keep_top_p(logits, 0.6)) == {0, 1}
    assert kept(keep_top_p(logits, 1e-9)) == {0}
    assert kept(keep_top_p(logits, 1.0)) == {0, 1, 2, 3}
    assert kept(keep_top_p(torch.zeros(4), 0.5)) == {0, 1}


def test_filters_work_on_each_row_by_itself():
    rows = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    assert keep_top_k(rows, 1).isfinite().tolist() == [[False, False, True], [True, False, False]]
    assert keep_top_p(rows, 0.1).isfinite().tolist() == [[False, False, True], [True, False, False]]


@given(LOGITS, st.floats(0.01, 5), st.integers(1, 25), st.floats(0.01, 1), st.integers(0, 99))
@settings(deadline=None)
def test_a_sample_is_allowed_by_both_filters_and_follows_the_seed(values, temperature, k, p, seed):
    logits = torch.tensor([values])
    draws = [int(sample(logits, Sampling(temperature, k, p), torch.Generator().manual_seed(seed))) for _ in range(2)]
    assert draws[0] == draws[1]
    shifted = (logits[0] - logits.max()) / temperature
    assert draws[0] in kept(keep_top_p(keep_top_k(shifted, k), p))


def test_frequencies_follow_the_tempered_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = sample(logits.expand(20_000, 4), Sampling(temperature=2.0), torch.Generator().manual_seed(0))
    frequencies = draws.bincount(minlength=4) / 20_000
    # Four standard deviations of a binomial are 0.014 at most.
    torch.testing.assert_close(frequencies, (logits / 2).softmax(0), rtol=0, atol=0.014)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_takes_the_most_likely_token(temperature):
    logits = torch.tensor([[1.0, 5.0, 4.9], [3.0, -2.0, 0.0]])
    assert sample(logits, Sampling(temperature), torch.Generator()).tolist() == [1, 0]


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(ModelConfig(vocab_size=30, seq_length=8, d_model=16, num_layers=2, num_heads=2, tie_weights=False))
    model.initialize(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5, generator=generator)
    return model.eval()


def continuation(model, tokens, n, sampling=None, seed=0, **options):
    return list(generate(model, tokens, n, sampling or Sampling(), torch.Generator().manual_seed(seed), **options))


def test_greedy_generation_is_the_argmax_of_the_last_seq_length_tokens(model):
    expected = [1, 2, 3]
    with torch.no_grad():
        for _ in range(20):  # well past the context of 8
            expected.append(int(model(torch.tensor([expected[-8:]]))[0, -1].argmax()))
    assert len(set(expected)) > 5  # a model that repeats itself would hide a wrong context
    assert continuation(model, [1, 2, 3], 20, Sampling(temperature=0)) == expected[3:]


def test_the_seed_decides_the_text(model):
    first, again, other = (continuation(model, [1], 24, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_generation_stops_before_end_of_text(model):
    tokens = continuation(model, [1], 200)
    assert len(tokens) == 200
    end = tokens[50]
    assert continuation(model, [1], 200, end_of_text=end) == tokens[: tokens.index(end)]


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn(model):
    assert max(continuation(model, [1], 100)) >= 20
    assert max(continuation(model, [1], 100, vocab_size=20)) < 20


def test_the_callers_list_is_left_alone_and_no_gradients_are_kept(model):
    tokens = [1, 2]
    stream = generate(model, tokens, 3, Sampling(), torch.Generator())
    next(stream)
    assert tokens == [1, 2]
    assert torch.is_grad_enabled()  # between two tokens the caller's mode is in force


def test_a_diverged_model_is_reported():
    model = GPT(ModelConfig(vocab_size=30, seq_length=8, d_model=16, num_layers=1, num_heads=2)).eval()
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        continuation(model, [1], 1)


@given(st.text(max_size=30))
def test_streamed_characters_are_whole_and_together_the_text(text):
    stream = CharacterStream(ByteTokenizer())
    pieces = [stream.push(token) for token in ByteTokenizer().encode(text)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_stream_as_they_decode_at_once(data):
    stream = CharacterStream(ByteTokenizer())
    assert "".join(stream.push(token) for token in data) + stream.finish() == data.decode(errors="replace")


class FallbackTokenizer:
    """As SentencePiece's: shows unfinished characters as U+FFFD, and drops the space before the first word."""

    def decode_bytes(self, ids):
        data = b"".join(b" word" if token == 256 else bytes([token]) for token in ids)
        return data.decode(errors="replace").lstrip(" ").encode()


def test_a_tokenizer_that_decodes_in_context_streams_right():
    stream = CharacterStream(FallbackTokenizer())
    ids = [256, *"€".encode(), 256, 256, *"né".encode(), *[256] * 20]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == "word€ word wordné" + " word" * 20
    assert pieces[1:4] == ["", "", "€"]
