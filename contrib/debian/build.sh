#!/usr/bin/env bash
# Build the Debian package from the last commit. Usage: build.sh DIR [VERSION]; the package is in DIR then.
set -euo pipefail

cd "$(dirname "$0")/../.."
target=$(realpath -m "$1")
version=${2:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
source=$target/hlfsfs-$version

rm -rf "$source"
mkdir -p "$source"
git archive HEAD | tar --extract --directory "$source"
cp -r "$source/contrib/debian" "$source/debian"
cat >"$source/debian/changelog" <<END
hlfsfs ($version) unstable; urgency=medium

  * See CHANGELOG.md.

 -- The HLFS founders <hlfs@localhost>  $(git log -1 --format=%cD)
END
cd "$source"
dpkg-buildpackage --build=binary --unsigned-source --unsigned-changes --diff-ignore >"$target/build.log" 2>&1 || {
    tail -n 40 "$target/build.log" >&2
    exit 1
}
ls "$target"/hlfsfs_"$version"_*.deb
