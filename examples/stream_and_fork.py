"""Read a long text once, keep its state in a file, and write several endings from it.

python examples/stream_and_fork.py [--steps 300]
"""

from __future__ import annotations

import argparse

import ostinato


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--d-model", type=int, default=96)
    arguments = parser.parse_args()

    model = ostinato.LanguageModel(d_model=arguments.d_model, plan="gated_delta_net*2, attention(window=64)", depth=3)
    task = ostinato.task("text", window=64)  # Python's own documentation: every Python has it
    ostinato.fit(model, task, steps=arguments.steps, batch_size=8, evaluation_batches=4)

    # Read ten thousand bytes. What remains of them is a state of constant size.
    state = model.read(task.test_bytes[:10_000].decode(errors="ignore"))
    print(f"{ostinato.state.num_bytes(state):,} bytes hold what the model knows of 10,000 bytes of text")
    ostinato.state.save(state, "read.safetensors")

    # Any number of streams can go on from it; none of them changes it.
    state = ostinato.state.load("read.safetensors", like=model.initial_state(1))
    for seed in range(3):
        stream = model.stream(" The", state=state, temperature=0.7, seed=seed, max_tokens=100)
        print(f"--- ending {seed}: The{stream.read()}")


if __name__ == "__main__":
    main()
