"""A director's workflow: shots on a board, takes of them that form a graph, and what can be done with both (§ 3.4, § 4.3)."""
