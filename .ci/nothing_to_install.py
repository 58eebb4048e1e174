"""The build backend that `pip install .` finds: these files are read and run where they are."""


def build_wheel(*arguments, **options):
    raise SystemExit("there is nothing to install here: run `pip install -r requirements.txt`, then the scripts "
                     "in this directory, such as `python tal.py`")


build_sdist = build_editable = build_wheel
