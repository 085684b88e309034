"""The time of each part of a step: `make profile ARGS="--weights bf16"`."""

from __future__ import annotations

import argparse

from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.native.engine import NativeEngine
from benchmarks.compute.cases import BLOCKS, CASES, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    options = parser.parse_args()
    description = describe(resolve(options.model), "bfloat16", kv_dtype=options.kv_dtype)
    engine = NativeEngine.load(description, blocks=BLOCKS, weights=options.weights)
    engine.warm_up()
    print(f"{engine.kernels}, weights {options.weights}, KV {engine.layout.dtype}; per cent of the kernels' time")
    found = {case.name: parts(engine, case) for case in CASES}
    names = list(next(iter(found.values())))
    print(f"{'':24}" + "".join(f"{name:>9}" for name in names) + f"{'ms':>9}")
    for case, seconds in found.items():
        total = sum(seconds.values())
        print(f"{case:24}" + "".join(f"{100 * seconds[name] / total:9.1f}" for name in names) + f"{total * 1e3:9.1f}")


if __name__ == "__main__":
    main()
