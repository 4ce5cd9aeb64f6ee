#!/usr/bin/env bash
# Builds the base and the worker image of one platform and, if asked, pushes both.
# In the Silogen engine this script is called docker/build-and-push-silogen-finetuning-image.sh.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: docker/build-and-push-finetuning-image.sh [options] {cuda|rocm} [TAG]

  --registry NAME       registry and folder that the images are named after, for example registry.example.com/team
  --tag TAG             tag of both images (default: the current commit, with -dirty if there are local changes)
  --vendor-image IMAGE  build on another torch image than the one that base.Dockerfile names
  --extras LIST         more extras of the package for the worker than deepspeed,tensorboard: otlp,liger, say
  --push                push both images after the build; needs --registry
  --dry-run             print the commands and run none of them
  -h, --help            show this text

Environment:
  DOCKER     the program that builds (default: docker)
  REGISTRY   as --registry
  SKIP_PUSH  true: with TAG as an argument, build only

A TAG as an argument, as in the Silogen engine's script, pushes to REGISTRY unless SKIP_PUSH is true. Every image also
gets the name that it has there: PLATFORM-silogen-finetuning-base and PLATFORM-silogen-finetuning-worker.
TEXT
}

fail() {
    printf 'build-and-push-finetuning-image.sh: %s\n' "$1" >&2
    exit 2
}

run() {
    if [[ $dry_run == true ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

current_tag() {
    local tag
    tag=$(git -C "$root" rev-parse --short HEAD)
    if [[ -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
        tag+=-dirty
    fi
    printf '%s' "$tag"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
docker=${DOCKER:-docker}
platform='' registry=${REGISTRY:-} tag='' vendor_image='' extras='' push=false dry_run=false

while (($#)); do
    case $1 in
        --registry | --tag | --vendor-image | --extras)
            (($# > 1)) && [[ -n $2 ]] || fail "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" '%s' "$2"
            shift
            ;;
        --push) push=true ;;
        --dry-run) dry_run=true ;;
        -h | --help)
            usage
            exit 0
            ;;
        cuda | rocm)
            [[ -z $platform ]] || fail "one platform at a time: cuda or rocm"
            platform=$1
            ;;
        -*) fail "unknown option $1; see --help" ;;
        *)
            [[ -n $platform ]] || fail "unknown argument $1: name the platform first, cuda or rocm; see --help"
            [[ -z $tag ]] || fail "two tags: $tag and $1"
            tag=$1
            [[ ${SKIP_PUSH:-false} == true || -z $registry ]] || push=true
            ;;
    esac
    shift
done

[[ -n $platform ]] || fail "which platform? cuda or rocm"
[[ $push == false || -n $registry ]] || fail "--push needs --registry"
tag=${tag:-$(current_tag)}
prefix=${registry:+${registry%/}/}${platform}-finetuning
alias_prefix=${registry:+${registry%/}/}${platform}-silogen-finetuning
revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || printf unknown)

base_options=()
if [[ -n $vendor_image ]]; then
    base_options+=(--build-arg "VENDOR_IMAGE=$vendor_image")
fi
run "$docker" build "${base_options[@]}" --file "$root/docker/$platform/base.Dockerfile" --tag "$prefix-base:$tag" \
    --tag "$alias_prefix-base:$tag" "$root"
run "$docker" build --build-arg "BASE_IMAGE=$prefix-base:$tag" --build-arg "REVISION=$revision" \
    --build-arg "EXTRAS=[deepspeed,tensorboard${extras:+,$extras}]" --file "$root/docker/$platform/worker.Dockerfile" \
    --tag "$prefix-worker:$tag" --tag "$alias_prefix-worker:$tag" "$root"
if [[ $push == true ]]; then
    for image in "$prefix-base" "$prefix-worker" "$alias_prefix-base" "$alias_prefix-worker"; do
        run "$docker" push "$image:$tag"
    done
fi
