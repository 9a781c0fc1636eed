# Sourced by the launch scripts: makes and enters .venv with cmd_jax and the extras named; quick when nothing changed.
# PYTHON names the interpreter it is made with, VENV another folder; one folder serves one version of Python.
VENV="${VENV:-.venv}"
extras="${1:-}"
version='import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'
if [ -n "${PYTHON:-}" ] || [ ! -e "$VENV/bin/activate" ]; then
    asked="$("${PYTHON:-python3}" -c "$version" 2>/dev/null)" || {
        echo "PYTHON=${PYTHON:-python3}: ${asked:+is $asked, }not a Python from 3.11; name one, like PYTHON=python3.12" >&2
        exit 2
    }
fi
if [ ! -e "$VENV/bin/activate" ]; then  # what venv writes last
    echo "making $VENV with Python $asked"
    "${PYTHON:-python3}" -m venv "$VENV"
elif [ -n "${PYTHON:-}" ] && [ "$("$VENV/bin/python" -c "$version")" != "$asked" ]; then
    echo "PYTHON=$PYTHON: is $asked, but $VENV was made with another; name another folder, like VENV=.venv-$asked" >&2
    exit 2
fi
. "$VENV/bin/activate"
stamp="$VENV/installed-$(cat pyproject.toml requirements.txt | sha256sum | cut -c1-16)-$extras"
if [ ! -e "$stamp" ]; then
    echo "installing cmd_jax${extras:+[$extras]} into $VENV"
    python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    touch "$stamp"
fi
