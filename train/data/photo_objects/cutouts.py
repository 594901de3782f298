"""Which of Debian's pictures `photo_objects` is made of, and which split owns each.

The cut-outs are the photographs, looked at one by one, of tuxpaint-stamps-default;
what is drawn there is left out. Pictures of one animal or of one kind of thing (a gnu
and its calf, five apples) are in one split. Backgrounds show none of the classes. The
split "seen" has the cut-outs of train in scenes of validation. Kinds and families are
those of the configs "families"; one of their backgrounds has boats, which are of
neither kind, and the leaves have seeds among them.
"""

STAMPS = "tuxpaint/stamps"

# Class, whose position is its label: folder, and the names in it that a split owns.
CLASSES = {
    "bird": (
        "animals/birds",
        {
            "train": "adelaide-rosella blackbird chicken_profile hen rooster cuckoo "
            "drake duck gander guineafowl helmeted_guineafowl heron_greatblue "
            "heron_greatblue_flying little-penguin magellanic_penguin penguin nandou "
            "ostrich owl seagull silver-gull",
            "validation": "crow lark peacock albino_peahen pelican rainbow-lorikeet "
            "vulture",
            "test": "magpie pigeon pink_flamingo quetzal tucan turkey crowned_crane",
        },
    ),
    "hoofed": (
        "animals/mammals",
        {
            "train": "bovines/bison bovines/yak bovines/cow bovines/cow_white "
            "bovines/gnu-baby-stand bovines/gnu-baby bovines/gnu-sitting "
            "bovines/gnu-stand bovines/ram bovines/sheep bovines/sheep_lamb deer/deer "
            "deer/doe deer/wapiti deer/caribou equines/donkey equines/donkey_eating "
            "pig pig_golden pig_golden2",
            "validation": "bovines/goat bovines/zebu camel/camel camel/dromedary "
            "equines/zebra",
            "test": "bovines/bull bovines/indian_blackbuck bovines/mountaingoat "
            "equines/horse giraffe wildboar",
        },
    ),
    "carnivore": (
        "animals/mammals",
        {
            "train": "bears/bear bears/european-bear cats/lion cats/lion-2 dogs/dingo "
            "dogs/dog ferret",
            "validation": "badger dogs/fox",
            "test": "aquatic/otter cats/tiger cats/tiger_sumatran",
        },
    ),
    "flower": (
        "plants/flowers",
        {
            "train": "adeenia anemone_red appooppanthady bolsom chemparathi flower10 "
            "flower1 flower2 flower5 flower4 flower6 flower8 flower9 iris",
            "validation": "anthoorium flower7 marigold rose pigface",
            "test": "daffodil flower3 red-gazania whitestar-petunia yellow-flower",
        },
    ),
    "fruit": (
        "food/fruit",
        {
            "train": "Apricot_whole apricot apple_fuji apple_granny_smith apple_green "
            "apple_red apple_sierra_beauty avocado Strawberry2 strawberry raspberry "
            "lemon sliced_lime grapes pear",
            "validation": "banana mandarine orange orange_seville sliced_orange",
            "test": "Cherry_Stella cherimoya kiwi mango pineapple pomegranate",
        },
    ),
    "vegetable": (
        "food/vegetables",
        {
            "train": "broccoli chilepepper pepper yellowpepper garlic garlics lettuce "
            "redlettuce onion potato yam",
            "validation": "corn tomato mushroom",
            "test": "carrot eggplant pattypan_squash pumpkin_small",
        },
    ),
    "vehicle": (
        "",
        {
            "train": "vehicles/auto/beetle vehicles/auto/sportscar2 "
            "vehicles/emergency/firetruck vehicles/garbagetruck "
            "vehicles/flight/planes/747 vehicles/ship/chineseJunk "
            "vehicles/ship/walnutBoat vehicles/race/indycar "
            "military/vehicles/bradley military/vehicles/infantry-stryker",
            "validation": "vehicles/auto/truck vehicles/cycle/pink_tricycle "
            "military/vehicles/ww2_german_gun",
            "test": "vehicles/auto/sedan vehicles/construction/dumper "
            "vehicles/masstransit/green_korean_bus",
        },
    ),
    "tool": (
        "household",
        {
            "train": "tools/hammer tools/mallet_metal tools/plyers tools/spade "
            "tools/wrench tools/wrench_adjustable tools/wrench_plumbers "
            "tools/paintbrush_large",
            "validation": "arttools/scissors_small_closed arttools/scissors_small_open",
            "test": "tools/saw tools/measuring_tape dishes/utensils/nutcracker",
        },
    ),
}
# Things of no class, which stand beside the object.
OTHERS = {
    "train": "household/Lightbulb household/garbagecan household/kettle "
    "household/toilet household/dishes/mug household/dishes/teapot "
    "sports/basketball sports/cricketball "
    "sports/soccer hobbies/camera_35mm hobbies/music/string/cello "
    "hobbies/music/string/guitar2 hobbies/music/string/guitar_classical "
    "hobbies/music/percussion/drumkit town/roadsigns/no_entry_sign "
    "town/roadsigns/school_sign seasonal/candle",
    "validation": "household/wheelie_bin household/dishes/pitcher_small "
    "sports/football hobbies/music/brass/trumpet hobbies/music/string/violin "
    "town/roadsigns/dead_end_sign",
    "test": "household/home_compost_bin household/dishes/utensils/pepper_grinder "
    "sports/tennis_ball hobbies/binoculars hobbies/music/percussion/drum_tomtom_floor "
    "hobbies/music/string/guitar_electric town/roadsigns/no_uturn",
}
MATE = "backgrounds/mate/nature/{}.jpg"
PLASMA = "wallpapers/{}/contents/images/2560x1600.jpg"


def _mate(*names: str) -> tuple[str, ...]:
    return tuple(map(MATE.format, names))


def _plasma(*names: str) -> tuple[str, ...]:
    return tuple(map(PLASMA.format, names))


BACKGROUNDS = {
    "train": _mate("Blinds", "Dune", "GreenMeadow", "Aqua")
    + _plasma("BytheWater", "ColorfulCups", "DarkestHour", "FallenLeaf"),
    "validation": _mate("RainDrops", "Storm") + _plasma("Grey", "Path"),
    "test": _mate("Wood") + _plasma("summer_1am", "ColdRipple", "Kite"),
}

# Kind, whose position is its label under "families": its classes.
KINDS = {
    "animal": ("bird", "hoofed", "carnivore"),
    "plant": ("flower", "fruit", "vegetable"),
}
# Backgrounds of two families, and which split owns each; in training the kind at a
# position is mostly seen on the family there.
FAMILIES = {
    "water and sky": {
        "train": _mate("Aqua") + _plasma("BytheWater", "DarkestHour"),
        "validation": _mate("Storm") + _plasma("EveningGlow"),
        "test": _plasma("ColdRipple", "Kite", "summer_1am"),
    },
    "leaves": {
        "train": _mate("Blinds", "Dune", "GreenMeadow") + _plasma("FallenLeaf"),
        "validation": _mate("RainDrops") + _plasma("Path"),
        "test": _mate("TwoWings") + _plasma("OneStandsOut"),
    },
}

# A split, whose cut-outs it shows, and whose things and backgrounds.
SPLITS = {
    "train": ("train", "train"),
    "validation": ("validation", "validation"),
    "test": ("test", "test"),
    "seen": ("train", "validation"),
}


def stamps(folder: str, names: str) -> tuple[str, ...]:
    """Paths under /usr/share of the cut-outs `names` of a folder of `STAMPS`."""
    start = f"{STAMPS}/{folder}/" if folder else f"{STAMPS}/"
    return tuple(f"{start}{name}.png" for name in names.split())
