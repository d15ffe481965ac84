"""Networks and packs that FLOPs are counted of."""

from tests.nn.conftest import make_pack, mixed_clips, model, small_config  # noqa: F401
