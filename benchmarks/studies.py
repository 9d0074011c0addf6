"""The studies: models, sizes, claims. Sizes and claims are fixed before seeds are drawn; what was found is written after."""

from benchmarks.study import Claim, Model, Study

N1 = ("sleep.passes=1",)
# The transformer that keeps its whole cache: sliding eviction in a window longer than any sequence evicts nothing.
ATTENTION = (*N1, "model.pattern=AAAA", "sleep.eviction=sliding", "model.window=1024")
RATES = ("5e-3", "2e-3", "7e-4")

TRACK = Study(
    name="track",
    title="The word problem of S3, a generator a window, asked after every window",
    recipe="track",
    task="track",
    sizes=("asked=each", "min_windows=8"),
    train_samples=256_000,
    test_samples=1024,
    longer=(("windows=16", "min_windows=16"), ("windows=64", "min_windows=64")),
    models=(
        Model("N=2"),
        Model("N=2, embeddings again", ("sleep.pass_input=embeddings",)),
        Model("N=2, last write", ("sleep.write=last",)),
        Model("N=1", N1),
        Model("N=1, 3x", N1, cost=3),
        Model("N=1, AGAG", (*N1, "model.pattern=AGAG")),
        Model("N=1, beta to 2", (*N1, "model.gdn.allow_neg_eigval=true")),
        *(Model(f"attention, lr {rate}", (*ATTENTION, f"optimizer.lr={rate}")) for rate in RATES),
        *(Model(f"attention, 3x, lr {rate}", (*ATTENTION, f"optimizer.lr={rate}"), cost=3) for rate in RATES),
        Model("Mamba-2, N=1", (*N1, "model.pattern=AM")),
        Model("Mamba-2, N=2", ("model.pattern=AM",)),
    ),
    claims=tuple(
        Claim(text, above, below, windows, depth, points)
        for text, above, below, windows, depth, points in (
            ("N=2 is right at the trained length", "N=2", (), 8, 8, 95),
            ("... and at twice that", "N=2", (), 16, 16, 90),
            ("... and at eight times that", "N=2", (), 64, 64, 90),
            ("N=1 with the same FLOPs is not, at 8", "N=2", ("N=1", "N=1, AGAG"), 8, 8, 40),
            ("N=1 with three times the FLOPs is not, at 8", "N=2", ("N=1, 3x",), 8, 8, 30),
            ("feedback is needed: embeddings again are not enough, at 8", "N=2", ("N=2, embeddings again",), 8, 8, 40),
            ("one write is enough: right at 8", "N=2, last write", (), 8, 8, 95),
            ("beta to 2 is not enough at N=1, at 16", "N=2", ("N=1, beta to 2",), 16, 16, 30),
            (
                "attention with its cache is not right at 16",
                "N=2",
                tuple(f"attention, 3x, lr {r}" for r in RATES),
                16,
                16,
                30,
            ),
        )
    ),
    about=(
        "S3 is the smallest group that is not commutative; every window multiplies by one of two generators, and a probe",
        "after it asks where one of the three elements is. A probe is read, answered and forgotten: no answer helps a later one.",
        "Depth is the number of windows so far; only 8 windows are trained. No training word begins with the six generators of",
        "a test word; all words of up to five generators are trained. FLOPs are those of N=2 in the recipe's steps, three",
        "times that where it says 3x; the steps of each model follow from that.",
    ),
)

STUDIES = (TRACK,)
