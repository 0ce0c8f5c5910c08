"""What may be in a run folder that nobody of ours wrote."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# What may stand in a config.yaml that nobody of ours wrote.
_NODES = st.sampled_from([
    "", "null", "~", "[]", "{}", "3", "-1", "1e999", ".nan", "yes", "2024-13-45", "2024-01-01", "0x1F", "1:30", "'${lr}'",
    "${oc.env:HOME}", "*x", "&x [*x]", "&x 3", "!!int abc", "!!float abc", "!!bool abc", "!!timestamp abc", "!!binary abc",
    "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [{a: 1}]", '!!omap [{a: "${oc.env:HOME}"}]', "!!pairs [{a: 1}]",
    "!!python/object/apply:os.system [true]", "!!python/name:os.system", "{_target_: os.system}", "{name: cnn}", "{name: [cnn]}",
    "{name: {a: 1}}", "???", "'???'", "[[[[[[]]]]]]", "{? [a, b] : c}", "{null: 1}", "{1: 2}", "{true: 1}", "{1.5: 1}", "|\n  text",
    "[1, 2", "{a: 1", "'", '"\\x00"', '"\\ud800"', "%TAG", "@", "`", "\t", "{_node_: 1}", "{content: 1, flags: {}}", "[" * 300,
    "{a: " * 300, "9" * 5000, "9" * 400, "é中😀",
])  # fmt: skip


def meddled(text: str) -> SearchStrategy[bytes]:
    """Return a config.yaml after somebody changed a line, cut it, or wrote over it."""
    lines = text.splitlines()

    def line(number: int, node: str) -> bytes:
        key = lines[number].partition(":")[0]
        return "\n".join([*lines[:number], f"{key}: {node}", *lines[number + 1 :]]).encode(
            errors="surrogatepass"
        )

    whole = text.encode()
    changed = st.builds(line, st.integers(0, len(lines) - 1), _NODES)
    cut = st.integers(0, len(whole)).map(lambda end: whole[:end])
    overwritten = st.tuples(st.integers(0, len(whole)), st.binary(max_size=4)).map(
        lambda patch: whole[: patch[0]] + patch[1] + whole[patch[0] + len(patch[1]) :]
    )
    gone = st.tuples(st.integers(0, len(lines) - 1), st.integers(1, 30)).map(
        lambda part: "\n".join(lines[: part[0]] + lines[part[0] + part[1] :]).encode()
    )
    other = _NODES.map(lambda node: node.encode(errors="surrogatepass")) | st.binary(max_size=30)
    return changed | changed | changed | cut | overwritten | gone | other
