"""Pictures: who sees whom, where the rows sit, and what came out."""

from lct.draw.mask import mask_picture
from lct.draw.positions import positions_picture
from lct.draw.sheet import contact_sheet

__all__ = ["contact_sheet", "mask_picture", "positions_picture"]
