"""Coordinates and masks worked out by hand from Fig. 3 (b) and §3.3; nothing in this file is computed.

Scenes are in the oracle's form. A mask is a list of rows, one character per key: "#" seen, "." not seen.
"""

ONE_SHOT = [[(3, (2, 2, 3), "shot")]]
# fmt: off
ONE_SHOT_POSITIONS = [
    (0, 0, 0), (1, 1, 1), (2, 2, 2),
    (3, 3, 3), (3, 3, 4), (3, 3, 5),
    (3, 4, 3), (3, 4, 4), (3, 4, 5),
    (4, 3, 3), (4, 3, 4), (4, 3, 5),
    (4, 4, 3), (4, 4, 4), (4, 4, 5),
]

# The first shot's longest side is 2 (height and width), the second's is 3 (time): an image, then a clip.
TWO_SHOTS = [[(2, (1, 2, 2), "shot"), (1, (3, 1, 2), "shot")]]
TWO_SHOTS_POSITIONS = [
    (0, 0, 0), (1, 1, 1),
    (2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3),
    (4, 4, 4),
    (5, 5, 5), (5, 5, 6), (6, 5, 5), (6, 5, 6), (7, 5, 5), (7, 5, 6),
]
TWO_SHOTS_POSITIONS_HALF_TEXT = [
    (0, 0, 0), (0.5, 0.5, 0.5),
    (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2),
    (3, 3, 3),
    (3.5, 3.5, 3.5), (3.5, 3.5, 4.5), (4.5, 3.5, 3.5), (4.5, 3.5, 4.5), (5.5, 3.5, 3.5), (5.5, 3.5, 4.5),
]
TWO_SHOTS_POSITIONS_STILL_TEXT = [
    (0, 0, 0), (0, 0, 0),
    (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1),
    (2, 2, 2),
    (2, 2, 2), (2, 2, 3), (3, 2, 2), (3, 2, 3), (4, 2, 2), (4, 2, 3),
]

GLOBAL_AND_TWO = [[(2, (1, 1, 1), "global"), (1, (1, 1, 2), "shot"), (2, (2, 1, 1), "shot")]]
GLOBAL_AND_TWO_ROWS = [
    (0, 0, "text", 0), (0, 0, "text", 1), (0, 0, "video", 0),
    (0, 1, "text", 0), (0, 1, "video", 0), (0, 1, "video", 1),
    (0, 2, "text", 0), (0, 2, "text", 1), (0, 2, "video", 0), (0, 2, "video", 1),
]
GLOBAL_AND_TWO_POSITIONS = [
    (0, 0, 0), (1, 1, 1), (2, 2, 2),
    (3, 3, 3), (4, 4, 4), (4, 4, 5),
    (6, 6, 6), (7, 7, 7), (8, 8, 8), (9, 8, 8),
]
# fmt: on
GLOBAL_AND_TWO_CONTEXT_CAUSAL = [
    "###.......",
    "###.......",
    "###.......",
    "######....",
    "######....",
    "######....",
    "##########",
    "##########",
    "##########",
    "##########",
]
GLOBAL_AND_TWO_ISOLATED = [
    "###.......",
    "###.......",
    "###.......",
    "######....",
    "######....",
    "######....",
    "###...####",
    "###...####",
    "###...####",
    "###...####",
]
GLOBAL_AND_TWO_BIDIRECTIONAL = [
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
    "##########",
]

# Shot 3 draws on shot 1 only and skips shot 2, as in human selection (§3.4); shot 2 draws on nothing.
GLOBAL_AND_THREE = [
    [(2, (1, 1, 1), "global"), (1, (1, 1, 2), "shot"), (2, (2, 1, 1), "shot"), (1, (1, 1, 1), "shot")],
]
SHOT_3_SEES_SHOT_1 = [[(), (), (), (1,)]]
GLOBAL_AND_THREE_SELECTION = [
    "###.........",
    "###.........",
    "###.........",
    "######......",
    "######......",
    "######......",
    "###...####..",
    "###...####..",
    "###...####..",
    "###...####..",
    "######....##",
    "######....##",
]

# The second scene starts over at the origin; without a global prompt its first shot is shot 0. No text in its second.
TWO_SCENES = [
    [(1, (1, 1, 1), "global"), (1, (1, 1, 1), "shot")],
    [(2, (1, 1, 1), "shot"), (0, (1, 2, 1), "shot")],
]
# fmt: off
TWO_SCENES_POSITIONS = [
    (0, 0, 0), (1, 1, 1),
    (2, 2, 2), (3, 3, 3),
    (0, 0, 0), (1, 1, 1), (2, 2, 2),
    (3, 3, 3), (3, 4, 3),
]
# fmt: on
TWO_SCENES_CONTEXT_CAUSAL = [
    "##.......",
    "##.......",
    "####.....",
    "####.....",
    "....###..",
    "....###..",
    "....###..",
    "....#####",
    "....#####",
]
TWO_SCENES_ISOLATED = [
    "##.......",
    "##.......",
    "####.....",
    "####.....",
    "....###..",
    "....###..",
    "....###..",
    ".......##",
    ".......##",
]

POSITIONS = {
    "one shot": (ONE_SHOT, 1.0, ONE_SHOT_POSITIONS),
    "two shots": (TWO_SHOTS, 1.0, TWO_SHOTS_POSITIONS),
    "two shots, half text steps": (TWO_SHOTS, 0.5, TWO_SHOTS_POSITIONS_HALF_TEXT),
    "two shots, text at the origin": (TWO_SHOTS, 0.0, TWO_SHOTS_POSITIONS_STILL_TEXT),
    "global and two shots": (GLOBAL_AND_TWO, 1.0, GLOBAL_AND_TWO_POSITIONS),
    "two scenes": (TWO_SCENES, 1.0, TWO_SCENES_POSITIONS),
}
MASKS = {
    "context-causal": (GLOBAL_AND_TWO, "context_causal", GLOBAL_AND_TWO_CONTEXT_CAUSAL),
    "isolated": (GLOBAL_AND_TWO, "isolated", GLOBAL_AND_TWO_ISOLATED),
    "bidirectional": (GLOBAL_AND_TWO, "bidirectional", GLOBAL_AND_TWO_BIDIRECTIONAL),
    "selection": (GLOBAL_AND_THREE, SHOT_3_SEES_SHOT_1, GLOBAL_AND_THREE_SELECTION),
    "two scenes, context-causal": (TWO_SCENES, "context_causal", TWO_SCENES_CONTEXT_CAUSAL),
    "two scenes, isolated": (TWO_SCENES, "isolated", TWO_SCENES_ISOLATED),
}
