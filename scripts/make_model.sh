#!/bin/sh
# Make the shipped model and the demo's pictures again, from packages to demo/model. Run in the repository's root:
#     sh scripts/make_model.sh WORK [SECONDS_VAE] [SECONDS_UNET]
# Stop it at any time and run it again: it goes on where it was. WORK holds everything that is not shipped.
set -eu
work=${1:?folder for the work data}
python scripts/make_tokenizer.py
python scripts/make_photos.py
test -e "$work/vae_pictures.npz" || python scripts/make_pictures.py --work "$work"
test -e "$work/vae/config.json" || python scripts/train_vae.py --work "$work" --seconds "${2:-3600}"
python scripts/train_unet.py --work "$work" --seconds "${3:-14400}"
python scripts/pack_model.py --work "$work"
python scripts/draw_grid.py
