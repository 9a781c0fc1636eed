# Sourced by the launch scripts: makes and enters .venv with cmd_jax and the extras named; quick when nothing changed.
VENV="${VENV:-.venv}"
extras="${1:-}"
if [ ! -e "$VENV/bin/activate" ]; then  # what venv writes last
    echo "making $VENV"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "PYTHON=${PYTHON:-python3}: older than 3.11; name a newer one, like PYTHON=python3.12" >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv "$VENV"
fi
. "$VENV/bin/activate"
stamp="$VENV/installed-$(cat pyproject.toml requirements.txt | sha256sum | cut -c1-16)-$extras"
if [ ! -e "$stamp" ]; then
    echo "installing cmd_jax${extras:+[$extras]} into $VENV"
    python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    touch "$stamp"
fi
