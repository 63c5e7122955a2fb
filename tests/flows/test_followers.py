"""Jobs that wait for others: each starts once, when the last thing that it needs has happened."""

from flows.followers import Event, Follower, Waiting


def event(step, what="analysed", pack="p"):
    return Event(what, pack, step)


def follower(key, *needs, kind="pair", pack="p"):
    return Follower(kind, pack, max(need.step for need in needs), key, frozenset(needs))


def keys(followers):
    return [one.key for one in followers]


def test_a_follower_starts_once_everything_has_happened_in_any_order():
    waiting = Waiting([follower("a", event(0), event(5)), follower("b", event(5), event(9))])
    assert waiting.after(event(9)) == []
    assert waiting.after(event(0)) == []
    assert keys(waiting.after(event(5))) == ["a", "b"]
    assert waiting.after(event(5)) == []


def test_events_of_other_packs_and_of_other_kinds_do_not_count():
    waiting = Waiting([follower("a", event(5, "trained"))])
    assert waiting.after(event(5)) == []
    assert waiting.after(event(5, "trained", "q")) == []
    assert keys(waiting.after(event(5, "trained"))) == ["a"]


def test_a_follower_may_wait_for_several_packs():
    both = follower("a", event(3, "trained", "p"), event(3, "trained", "q"), kind="separations", pack="q")
    waiting = Waiting([both])
    assert waiting.after(event(3, "trained", "q")) == []
    assert keys(waiting.after(event(3, "trained", "p"))) == ["a"]


def test_the_steps_that_followers_need_are_known_by_pack():
    waiting = Waiting(
        [
            follower("a", event(0), event(5)),
            follower("b", event(7, "trained"), event(7, "trained", "q"), pack="q"),
        ]
    )
    assert dict(waiting.needed_steps("analysed")) == {"p": {0, 5}}
    assert dict(waiting.needed_steps("trained", "analysed")) == {"p": {0, 5, 7}, "q": {7}}
    assert waiting.needed_steps("analysed")["unknown"] == set()
