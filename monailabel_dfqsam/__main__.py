"""`python -m monailabel_dfqsam`: the command line without its console script."""

from monailabel_dfqsam.cli import app

if __name__ == "__main__":
    app(prog_name="dfqsam")
