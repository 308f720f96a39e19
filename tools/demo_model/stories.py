"""A grammar of short children's stories: unlimited simple, fluent English that belongs to the project."""

from __future__ import annotations

import random
from dataclasses import dataclass

BOYS = ["Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Tim", "Paul", "Finn", "Oscar"]
GIRLS = ["Lily", "Mia", "Anna", "Sue", "Rose", "Zoe", "Emma", "Ella", "Kate", "Nora"]
ANIMALS = [
    "dog",
    "cat",
    "rabbit",
    "duck",
    "bird",
    "turtle",
    "mouse",
    "pony",
    "frog",
    "fox",
    "bear",
    "owl",
    "hedgehog",
    "squirrel",
    "lamb",
    "kitten",
]
THINGS = ["ball", "kite", "boat", "book", "hat", "drum", "cup", "box", "key", "lamp", "bell", "toy", "car"]
LOOKS = ["red", "blue", "green", "yellow", "white", "black", "brown", "little", "big", "shiny", "old", "new"]
PLACES = ["park", "garden", "forest", "beach", "river", "farm", "school", "hill", "lake", "market"]
WEATHERS = ["sunny", "rainy", "windy", "cold", "warm", "bright", "snowy"]
GLAD = ["happy", "glad", "proud", "excited"]
UPSET = ["sad", "scared", "worried", "upset", "tired"]
GROWN_UPS = ["mom", "dad", "grandma", "grandpa", "teacher"]
MORALS = (
    "It is good to share.",
    "Friends help each other.",
    "It is always best to tell the truth.",
    "Being kind makes everyone happy.",
    "Never give up when things are hard.",
    "Saying sorry can fix many things.",
)
REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
    "Please tell me a story.",
    "I want to hear a story.",
    "Write a short story.",
    "Do you know a story?",
    "A story, please.",
)
ABOUT = (
    "Tell me a story about {0}.",
    "Tell me a short story about {0}.",
    "Can you tell me a story about {0}?",
    "Write a story about {0}.",
    "I want a story about {0}.",
    "Please write a short story about {0}.",
)


@dataclass(frozen=True)
class Story:
    """A story, a request that it answers, and what it is about."""

    request: str
    text: str
    about: str


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def make_story(rng: random.Random) -> Story:
    """One story of five to eight sentences; the request names what the story holds."""
    boy = rng.random() < 0.5
    name = rng.choice(BOYS if boy else GIRLS)
    he, him, his = ("he", "him", "his") if boy else ("she", "her", "her")
    friend = rng.choice([other for other in BOYS + GIRLS if other != name])
    animal, thing, look, place = (rng.choice(options) for options in (ANIMALS, THINGS, LOOKS, PLACES))
    grown_up, weather = rng.choice(GROWN_UPS), rng.choice(WEATHERS)
    slots = {
        "name": name,
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "his": his,
        "His": his.capitalize(),
        "friend": friend,
        "animal": animal,
        "an_animal": _with_article(animal),
        "thing": thing,
        "look": look,
        "a_look_thing": f"{_with_article(look)} {thing}",
        "place": place,
        "other_place": rng.choice([p for p in PLACES if p != place]),
        "grown_up": grown_up,
        "weather": weather,
        "glad": rng.choice(GLAD),
        "upset": rng.choice(UPSET),
        "kid": "boy" if boy else "girl",
        "moral": rng.choice(MORALS),
    }
    plot = rng.choice(PLOTS)
    if plot in ANIMAL_PLOTS:
        about, key = rng.choice(
            [(name, name), (_with_article(animal), animal), (f"{name} and {_with_article(animal)}", animal)]
        )
        opening = rng.choice(OPENINGS + ANIMAL_OPENINGS)
    else:
        about, key = rng.choice(
            [(name, name), (f"{_with_article(thing)}", thing), (f"a {slots['kid']} and {_with_article(thing)}", thing)]
        )
        opening = rng.choice(OPENINGS + THING_OPENINGS)
    text = " ".join((opening, *plot, rng.choice(ENDINGS))).format(**slots)
    request = rng.choice(REQUESTS) if rng.random() < 0.4 else rng.choice(ABOUT).format(about)
    return Story(request, text, key)


OPENINGS = (
    "Once upon a time, there was a {kid} named {name}.",
    "One {weather} day, {name} went to the {place}.",
    "{name} lived near the {place} with {his} {grown_up}.",
)
ANIMAL_OPENINGS = ("{name} lived near the {place} with {his} {grown_up} and {an_animal}.",)
THING_OPENINGS = ("{name} had {a_look_thing}. {He} loved it very much.",)
LOST = (
    "{He} wanted to play with {his} {look} {thing}, but it was gone.",
    '"Where is my {thing}?" asked {name}. {He} felt {upset}.',
    "{friend} came to help. They looked in the {other_place} and under a tree.",
    "Then {an_animal} ran up to them. The {animal} had the {thing}!",
    '"Thank you," said {name}. {He} was {glad} again.',
)
STUCK = (
    "There {he} saw {an_animal} that was stuck in a bush.",
    'The {animal} looked {upset}. "Do not worry," said {name}. "I will help you."',
    "{He} pulled and pulled, but it was too hard.",
    "{name} called {friend}. Together they set the {animal} free.",
    "The {animal} jumped with joy, and they all became friends.",
)
SHARING = (
    "{friend} wanted to play with the {look} {thing} too.",
    '"No, it is mine!" said {name}. {friend} was {upset} and went away.',
    "{name} did not have fun alone. {He} thought about what {he} had done.",
    '{He} ran to {friend} and said, "I am sorry. Let us play together."',
    "They played with the {thing} until it got dark.",
)
GIFT = (
    "{He} wanted to make something for {his} {grown_up}.",
    "{name} found {a_look_thing} and some flowers in the {other_place}.",
    "{He} worked all day with {friend}.",
    '"This is for you," said {name}. {His} {grown_up} smiled and gave {him} a big hug.',
)
STORM = (
    "The sky turned dark and it began to rain.",
    "{name} and the {animal} ran under a big tree. The {animal} was {upset}.",
    '"Let us sing a song," said {name}. They sang until the rain stopped.',
    "Then they saw a rainbow over the {place}.",
)
WISH = (
    "One night {name} saw a bright star and made a wish.",
    '"I wish I had a friend," {he} said.',
    "The next day {an_animal} sat in front of the door. It was {upset} and hungry.",
    "{name} gave it some bread and a warm bed.",
    "From then on the {animal} went everywhere with {him}.",
)
LESSON = (
    "{He} wanted to learn how to swim, but {he} was {upset}.",
    '"I can show you," said a kind {animal}. "Move your arms like this."',
    "{name} tried again and again, and every day it was a little easier.",
    "At last {he} swam across the {other_place} lake. Everyone was {glad}.",
)
SECRET = (
    "In the {other_place} {he} found {a_look_thing} under some leaves.",
    'Inside there was a small note. It said, "Look behind the old tree."',
    "{name} and {friend} ran to the old tree and found a box full of sweets.",
    "They shared the sweets with all their friends.",
)
ANIMAL_PLOTS = (STUCK, STORM, WISH, LESSON)
THING_PLOTS = (LOST, SHARING, GIFT, SECRET)
PLOTS = ANIMAL_PLOTS + THING_PLOTS
ENDINGS = (
    "From that day on, {name} and {friend} were best friends.",
    "{moral}",
    "{name} learned a lesson that day. {moral}",
    "{name} went home and told {his} {grown_up} all about it.",
    "They all went home and had a good sleep.",
)
