"""Networks and packs for counting FLOPs."""

from tests.nn.conftest import make_pack, mixed_clips, model, small_config  # noqa: F401
