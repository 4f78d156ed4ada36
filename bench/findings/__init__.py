"""The findings of the paper asked again on toy scenes, and the ways to its tables on real ones."""
