"""The users' Terra accounts, and the providers that they can connect."""

from dataclasses import dataclass
from datetime import datetime

from workers.simulator.people import Provider, User

_WATCH = frozenset({"activity", "daily", "sleep", "body", "menstruation", "planned_workout"})

# By Terra's names. A user's number selects the two that the user has.
PROVIDERS = {
    provider.slug: provider
    for provider in (
        Provider("PELOTON", "Peloton", "exercise_machine", "Bike+", frozenset({"activity"})),
        Provider("OURA", "Oura", "ring", "Gen3", frozenset({"daily", "sleep"})),
        Provider("GARMIN", "Garmin", "watch", "Forerunner 265", _WATCH),
        Provider("FREESTYLELIBRE", "FreeStyle Libre", "automatic", "Libre 3", frozenset({"body"})),
        Provider("WITHINGS", "Withings", "scale", "Body Cardio", frozenset({"body", "sleep"})),
        Provider("MYFITNESSPAL", "MyFitnessPal", "app", "MyFitnessPal", frozenset({"nutrition"})),
    )
}
APART = 2  # places between a user's two providers


@dataclass(frozen=True, slots=True)
class TerraUser:
    """One person's connection with one provider, which Terra calls a user. Reconnecting gives it another id."""

    user_id: str
    person: User
    provider: Provider
    since: datetime

    @property
    def key(self) -> tuple[int, str]:
        """The identity that all ids of the account share."""
        return self.person.number, self.provider.slug


def usual(person: User) -> list[Provider]:
    """The providers that a person has from the start."""
    providers = list(PROVIDERS.values())
    return [providers[(person.number + step) % len(providers)] for step in (0, APART)]
