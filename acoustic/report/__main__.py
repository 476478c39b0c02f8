"""Keep what a finished pretraining logged as its recipe's reference curve.

python -m acoustic.report OUTPUT_DIR RECIPE.yaml
"""

import argparse

from acoustic.console import one_line_errors, say
from acoustic.report.reference import keep

if __name__ == "__main__":
    with one_line_errors():
        parser = argparse.ArgumentParser("python -m acoustic.report", description=__doc__.splitlines()[0])
        parser.add_argument("output_dir", help="of the run")
        parser.add_argument("recipe", help="beside which it is kept, in results/")
        say(f"kept: {keep(**vars(parser.parse_args()))}")
