"""A director's workflow: shots on a board, takes of them that form a graph, actions on both (paper § 3.4, § 4.3)."""
