"""Whatever bytes a manifest, a shard, a checkpoint or a recipe holds: a value or a sentence, and soon."""

import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from fuzz_parsers import PARSERS, SEEDS, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIMITS = settings(max_examples=400, suppress_health_check=list(HealthCheck), database=None)
ODD = (
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers()
    | st.sampled_from([10**30, -1, 2**63, 1e308, "../../x", "\0", [], {}, [[]], "a" * 300, 10**400])
)  # fmt: skip
JSON = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@st.composite
def harmed(draw, seed):
    """A good file with bytes changed, cut out, put in; or with JSON values replaced; or nothing of it left."""
    how = draw(st.integers(0, 3))
    if how == 0:
        return draw(st.binary(max_size=300))
    if how == 1:
        data = bytearray(seed)
        for _ in range(draw(st.integers(1, 6))):
            at = draw(st.integers(0, len(data)))
            data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        return bytes(data)
    return replaced(draw, seed)


def replaced(draw, seed):
    """The seed with one JSON value of it, at any depth, replaced by an odd one; text: a word replaced."""
    start, end = seed.find(b"{"), len(seed)
    try:
        value, length = json.JSONDecoder().raw_decode(seed[start:].decode("latin-1"))
        end = start + length
    except ValueError:  # no JSON in it
        words = seed.split(b" ")
        words[draw(st.integers(0, len(words) - 1))] = str(draw(ODD)).encode(errors="surrogatepass")
        return b" ".join(words)
    places = list(inside(value))
    container, key = draw(st.sampled_from(places))
    container[key] = draw(JSON)
    text = json.dumps(value).encode()
    head = seed[:start]
    if len(head) == 8:  # a safetensors header's length
        head = len(text).to_bytes(8, "little")
    return head + text + seed[end:]


def inside(value):
    """Each place in a JSON value, as (container, key)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from inside(value[key])


def fed(name, data):
    folder, began = Path(tempfile.mkdtemp()), time.process_time()
    try:
        parse(name, folder, data)
    finally:
        shutil.rmtree(folder)
    assert time.process_time() - began < 20  # soon: milliseconds, as a rule


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_give_a_value_or_a_sentence(name):
    fed(name, SEEDS[name])

    @LIMITS
    @given(harmed(SEEDS[name]))
    def feed(data):
        fed(name, data)

    feed()


@pytest.mark.parametrize(
    "value", [None, 10**400, -1, 1e308, True, "x", "../../x", [], [None], {}], ids=lambda value: repr(value)[:8]
)
@pytest.mark.parametrize("name", ["manifest", "state", "record"])
def test_an_odd_value_in_any_place_gives_a_value_or_a_sentence(name, value):
    for place in range(len(list(inside(json.loads(SEEDS[name]))))):
        tree = json.loads(SEEDS[name])
        container, key = list(inside(tree))[place]
        container[key] = value
        fed(name, json.dumps(tree).encode())


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "data",
    [
        b"", b"[" * 10**6, b'{"a":' * 10**5, b"1" * 10**5, b"\xff\xfe", b"--" + b"a" * 10**5, b"-h", b'"', b"NaN",
        b"--unknown " * 1000, b"(" * 10**5, b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, b"--seed " + b"9" * 10**4,
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_known_troublemakers_give_a_value_or_a_sentence(name, data):
    fed(name, data)
