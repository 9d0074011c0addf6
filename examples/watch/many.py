"""What watch.py shows, counted over many samples: python many.py RUN [SAMPLES], without the first window of each."""

import sys
from collections import defaultdict
from pathlib import Path

from watch import load_run, read_word, watch


def main(run: Path, samples: int) -> None:
    model, found = load_run(run), defaultdict(list)
    for sample in range(samples):
        moments = watch(model, *read_word(run, sample))
        places = {moment.window: moment.right for moment in moments}
        for m in moments:
            if m.window > 0:
                moved = sum(m.moved.values()) / max(1, len(m.moved))
                found[m.passes].append((m.answers == m.right, m.answers == places[m.window - 1], moved))
    for passes, rows in found.items():
        new, old, moved = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(f"pass {passes}: new places {new:.0%}, old ones {old:.0%}, moved by {moved:.0%}, {len(rows)} windows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
