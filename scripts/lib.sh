# What the scripts share. Sourced, not run: `. "$(dirname "$0")/lib.sh"`.

# The oldest PostgreSQL that therev runs on.
oldest_postgres=15

# Bold, where that is shown.
if [ -t 2 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold='' plain=''; fi

say() {
    printf '\n%s%s%s\n' "$bold" "$*" "$plain" >&2
}

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Shows a command as one would type it, then runs it.
show() {
    printf '\n%s$ %s%s\n' "$bold" "$*" "$plain" >&2
    "$@"
}

# Runs a command as root without asking anything; fails when that cannot be had.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

may_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

# apt_install PACKAGE…: installs without a question and without changing settings that are there.
apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 \
        apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$@" >&2
}

apt_update() {
    [ -n "${apt_updated:-}" ] || as_root apt-get update -qq >&2
    apt_updated=1
}

need_cargo() {
    if ! command -v cargo >/dev/null; then
        [ -x "${CARGO_HOME:-${HOME:-/root}/.cargo}/bin/cargo" ] || fail "cargo is missing; install Rust from https://rustup.rs"
        PATH="${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH"
    fi
    local needed found
    needed=$(sed -n 's/^rust-version = "\(.*\)".*/\1/p' Cargo.toml)
    # By a manifest that it is too old for, cargo would not be asked.
    found=$(cd / && cargo --version | cut -d ' ' -f 2)
    [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] \
        || fail "cargo $found is too old, therev needs $needed; install it from https://rustup.rs, or run \`rustup update\`"
}

# Some libraries that therev is built from need a C compiler, and Rust a linker.
need_compiler() {
    command -v cc >/dev/null && return
    may_install || fail "a C compiler is missing; install one (Debian and Ubuntu: \`sudo apt-get install gcc libc6-dev\`)"
    say "Installing a C compiler"
    apt_update
    apt_install gcc libc6-dev
}

# need_venv: sets venv, a folder in target/ with a Python environment of this checkout's own.
need_venv() {
    venv=${CARGO_TARGET_DIR:-target}/venv
    [ ! -x "$venv/bin/pip" ] || return 0
    if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
        may_install || fail "Python with venv is missing; install it (Debian and Ubuntu: \`sudo apt-get install python3-venv\`)"
        say "Installing Python"
        apt_update
        apt_install python3-venv
    fi
    python3 -m venv --clear "$venv"
}

# postgres_in FOLDER: whether it holds a server that is new enough.
postgres_in() {
    local version
    [ -x "$1/postgres" ] && [ -x "$1/psql" ] || return 1
    version=$("$1/postgres" --version | sed -n 's/^[^)]*) \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge "$oldest_postgres" ]
}

# Whether there is one where `therev cluster up` will find it.
has_postgres() {
    local folder
    if [ -n "${THEREV_PG_BIN:-}" ]; then
        postgres_in "$THEREV_PG_BIN"
        return
    fi
    for folder in "$(dirname "$(command -v postgres || echo /none)")" \
        /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/local/pgsql/bin \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        postgres_in "$folder" && return
    done
    return 1
}

need_postgres() {
    has_postgres && return
    [ -z "${THEREV_PG_BIN:-}" ] || fail "THEREV_PG_BIN names no PostgreSQL $oldest_postgres or later; correct or unset it"
    may_install || fail "PostgreSQL $oldest_postgres or later is missing; install it (Debian and Ubuntu: \`sudo apt-get install postgresql\`)"
    say "Installing PostgreSQL"
    apt_update
    install_postgres
    has_postgres || fail "no PostgreSQL $oldest_postgres or later was installed; install one and run this again"
}

# The servers are therev's own: the package's main cluster is neither made nor started.
install_postgres() {
    local conf=/etc/postgresql-common/createcluster.conf package=postgresql candidate kept
    apt_install postgresql-common ca-certificates
    candidate=$(apt-cache policy postgresql | sed -n 's/^ *Candidate: \([0-9]*\).*/\1/p')
    if [ "${candidate:-0}" -lt "$oldest_postgres" ]; then
        # Older systems: PostgreSQL's own packages, by the script that Debian ships for it.
        as_root /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y >&2
        package=postgresql-17
    fi
    kept=$(mktemp)
    [ ! -f "$conf" ] || cp "$conf" "$kept"
    { grep -v '^ *create_main_cluster' "$kept" || true; echo 'create_main_cluster = false'; } | as_root tee "$conf" >/dev/null
    apt_install "$package" || package=
    # The setting was for this installation only.
    if [ -s "$kept" ]; then as_root tee "$conf" <"$kept" >/dev/null; else as_root rm -f "$conf"; fi
    rm -f "$kept"
    [ -n "$package" ] || fail "PostgreSQL could not be installed; see the reason above"
}
