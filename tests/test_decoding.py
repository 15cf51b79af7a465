"""Decoding with a cache against the model called by hand, and against transformers' generate."""

import pytest
import torch

from gpt2_xla import hf
from gpt2_xla.config import ModelConfig
from gpt2_xla.decoding import Decoder, Machine, generate
from gpt2_xla.errors import UserError
from gpt2_xla.kv_cache import KVCache
from gpt2_xla.model import GPT, causal_attention
from gpt2_xla.sampling import Sampling

torch.set_num_threads(1)  # see test_sampling.py
CONTEXT = 32
EAGER, COMPILED = (Machine(torch.device("cpu"), compiles) for compiles in (False, True))
MACHINES = pytest.mark.parametrize("machine", [EAGER, COMPILED], ids=["any shape", "fixed shapes"])
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def loud_model(seq_length: int = CONTEXT) -> GPT:
    """A model that does not repeat itself: large weights."""
    config = ModelConfig(vocab_size=61, seq_length=seq_length, d_model=32, num_layers=2, num_heads=4)
    model = GPT(config)
    model.initialize(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return loud_model()


def continuations(model, prompts, count, sampling=None, seeds=None, machine=EAGER, rows=None, **options):
    decoder = Decoder(model, machine, rows or len(prompts), count)
    texts = [[] for _ in prompts]
    seeds = seeds or range(len(prompts))
    for drawn in generate(decoder, prompts, seeds, count, sampling or Sampling(), **options):
        if drawn.token is not None:
            texts[drawn.row].append(drawn.token)
    return texts


def by_hand(model, prompt, count):
    """Greedy decoding that computes everything again for each token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens[-CONTEXT:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@MACHINES
def test_logits_of_every_row_are_those_of_the_row_alone_and_uncached(model, machine):
    decoder, texts = Decoder(model, machine, 5, 40), [list(prompt) for prompt in PROMPTS]
    logits = decoder.read(texts)
    for step in range(40):  # the longest slides from token 26 on, the shortest from 32 on
        for text, row in zip(texts, logits, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([text[-CONTEXT:]]))[0, -1], rtol=1e-4, atol=1e-4)
        added = [(7 * step + len(text)) % 61 for text in texts]
        texts = [[*text, token] for text, token in zip(texts, added, strict=True)]
        logits = decoder.add(added)


@MACHINES
def test_cached_and_uncached_greedy_tokens_are_the_same_also_past_the_context(model, machine):
    greedy = continuations(model, PROMPTS, 80, Sampling(temperature=0), machine=machine)
    assert len(set(greedy[0])) > 5  # a model that repeats itself would hide a wrong context
    assert greedy == [by_hand(model, prompt, 80) for prompt in PROMPTS]


@MACHINES
def test_a_seed_gives_the_same_text_in_any_batch(model, machine):
    prompts = [*PROMPTS, PROMPTS[0]]
    together = continuations(model, prompts, 50, seeds=[5, 6, 7, 8, 9], machine=machine)
    for prompt, seed, text in zip(prompts, range(5, 10), together, strict=True):
        assert continuations(model, [prompt], 50, seeds=[seed], machine=machine) == [text]
        assert continuations(model, [prompt], 50, seeds=[seed], machine=machine, rows=3) == [text]
    assert together[0] != together[4]  # one prompt, two seeds


def test_greedy_tokens_are_those_of_transformers_generate(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(**hf.hugging_face_config(model.config, None))).eval()
    theirs.load_state_dict(hf.to_hugging_face(dict(model.state_dict()), model.config), strict=False)
    theirs.tie_weights()
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
        ours = continuations(model, [prompt], 24, Sampling(temperature=0, repetition_penalty=1.3))
        assert ours[0] == expected[0, len(prompt) :].tolist()


@MACHINES
def test_rows_end_at_end_of_text_and_the_others_go_on(model, machine):
    free = continuations(model, PROMPTS, 60, machine=machine)
    places = {end: [text.index(end) if end in text else 60 for text in free] for end in range(61)}
    end = next(
        end for end, at in places.items() if min(at) < 10 and max(at) > CONTEXT
    )  # one row slides without another
    ended = continuations(model, PROMPTS, 60, machine=machine, end_of_text=end)
    assert ended == [text[:at] for text, at in zip(free, places[end], strict=True)]


def test_a_row_that_ended_past_the_context_no_longer_makes_the_others_pay(model):
    decoder, widths = Decoder(model, EAGER, 2, 60), []
    hook = model.wte.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    try:
        decoder.read([[1] * 30, [2]])
        for step in range(20):
            decoder.add([3 if step < 10 else None, 4])
    finally:
        hook.remove()
    assert widths == [30, 1, 1, *[CONTEXT] * 8, *[1] * 10]


def test_the_reason_of_each_rows_end_is_told_once(model):
    decoder = Decoder(model, EAGER, 2, 20)
    drawn = list(generate(decoder, PROMPTS[:2], [0, 1], 20, Sampling()))
    assert [(one.row, one.finish) for one in drawn if one.finish] == [(0, "length"), (1, "length")]
    end = next(one.token for one in drawn if one.row == 0)
    drawn = list(generate(decoder, PROMPTS[:1], [0], 20, Sampling(), end_of_text=end))
    assert drawn == [(0, None, "end_of_text")]


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn(model):
    assert max(continuations(model, [[1]], 100)[0]) >= 20
    assert max(continuations(model, [[1]], 100, vocab_size=20)[0]) < 20


def test_a_repetition_penalty_knows_the_prompt_and_what_was_drawn(model):
    # A penalty that no logit survives: no token of the prompt, and none twice, while there are others.
    text = continuations(model, [[1, 2, 3]], 50, Sampling(repetition_penalty=1e6, top_k=1))[0]
    assert len({1, 2, 3, *text}) > 40


def test_the_model_is_as_it_was_between_two_tokens(model):
    prompts = [[1, 2]]
    stream = generate(Decoder(model, EAGER, 1, 3), prompts, [0], 3, Sampling())
    next(stream)
    assert prompts == [[1, 2]]
    assert torch.is_grad_enabled()
    assert model.blocks[0].attn.attend is causal_attention
    assert not model.lm_head._forward_pre_hooks


def test_no_random_number_of_torch_is_drawn(model):
    before = torch.random.get_rng_state()
    continuations(model, [[1, 2]], 5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_diverged_model_is_reported():
    model = loud_model()
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        continuations(model, [[1]], 1)


@pytest.mark.parametrize("fixed", [False, True])
def test_heads_that_share_keys_see_what_they_would_with_keys_of_their_own(model, fixed):
    """Grouped queries: 4 heads over 2 of keys and values, layer by layer against plain attention over all tokens so far."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    whole = causal_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), 0.0)
    cache = KVCache(model, 12, fixed)
    attention = model.blocks[0].attn
    lengths, found = [5, 2, 4], torch.zeros_like(whole)
    with cache.attached():
        cache.read_prompts()
        found[:, :, :5] = attention.attend(q[:, :, :5], k[:, :, :5], v[:, :, :5], 0.0)  # pads included
        for step in range(4):
            at = [length + step for length in lengths]
            cache.decode(at, torch.device("cpu"))
            one = [torch.stack([t[row, :, p] for row, p in enumerate(at)]).unsqueeze(2) for t in (q, k, v)]
            y = attention.attend(*one, 0.0)
            for row, position in enumerate(at):
                found[row, :, position] = y[row, :, 0]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :, : length + 4], whole[row, :, : length + 4])
