"""Pictures: who sees whom, where the rows sit, what changes in a film, and what came out."""

from lct.draw.change import change_picture
from lct.draw.mask import mask_picture
from lct.draw.positions import positions_picture
from lct.draw.sheet import contact_sheet

__all__ = ["change_picture", "contact_sheet", "mask_picture", "positions_picture"]
