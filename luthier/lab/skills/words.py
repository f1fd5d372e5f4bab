"""The world's words. Names are made up, so that no model has met them; everything else is plain English."""

from __future__ import annotations

FIRST_NAMES = (
    "Mira", "Tavo", "Elka", "Brono", "Sila", "Daren", "Ulma", "Kesto", "Nala", "Orrin", "Pesha", "Rudo",
    "Vanya", "Yorik", "Zelda", "Hamo", "Inka", "Jaro", "Lumi", "Fenn", "Gorda", "Weslo", "Amaro", "Cinda",
)  # fmt: skip
LAST_NAMES = (
    "Tolen", "Varga", "Quist", "Brandel", "Osmer", "Kappel", "Lindor", "Marsk", "Nettle", "Pardo", "Ruskin", "Stavik",
    "Umber", "Welk", "Yarrow", "Zander", "Hollis", "Dorn", "Falk", "Greve", "Ilmar", "Jessen", "Corvin", "Abelard",
)  # fmt: skip
CITIES = (
    "Ravik", "Tarsel", "Omdal", "Belmor", "Kestrin", "Lunde", "Praxel", "Sorvia", "Dunmere", "Hask",
    "Vellin", "Orsa", "Mirefold", "Quellin", "Tresk", "Yavin", "Zorrel", "Fennick", "Galdor", "Ibsen",
    "Jorvel", "Nimrath", "Caldus", "Wexley", "Arvon", "Eskil", "Uldra", "Brisk", "Stroma", "Pellar",
)  # fmt: skip
COUNTRIES = ("Norland", "Estria", "Valdor", "Kerrin", "Sunder", "Maravia")
RIVERS = ("Aune", "Brill", "Sarka", "Dovre", "Lesk", "Ister", "Wend", "Tamis")
JOBS = (
    "baker", "smith", "teacher", "doctor", "farmer", "miller", "tailor", "painter", "sailor", "potter",
    "weaver", "carpenter", "clerk", "gardener", "judge", "hunter", "barber", "cook", "mason", "guard",
)  # fmt: skip
ANIMALS = (
    "dog", "cat", "horse", "goat", "parrot", "rabbit", "turtle", "ferret", "pigeon", "hamster",
    "sheep", "donkey", "duck", "lizard", "mouse", "crow",
)  # fmt: skip
INSTRUMENTS = ("violin", "flute", "drum", "harp", "trumpet", "piano", "guitar", "cello", "banjo", "organ", "oboe", "lute")
FOODS = (
    "bread", "soup", "cheese", "apples", "rice", "honey", "fish", "plums", "beans", "cake",
    "pears", "mushrooms", "noodles", "olives", "eggs", "berries",
)  # fmt: skip
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "gray", "pink", "golden", "silver", "purple")
OBJECTS = ("key", "coin", "ring", "book", "cup", "stone", "bell", "lamp", "rope", "map", "pen", "shoe", "glove", "spoon", "brush")
PLACES = ("kitchen", "garden", "cellar", "attic", "barn", "market", "harbor", "school", "tower", "yard")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
