"""lm-evaluation-harness with the model `powernap`: python -m powernap.lm_eval run --model powernap --model_args run=NAME ...

Every other option is the harness's own.
"""

import sys


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError:
        sys.exit("powernap: error: lm-evaluation-harness is not installed: pip install 'powernap[eval]'")
    import powernap.train.evaluation.harness  # noqa: F401  # registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
