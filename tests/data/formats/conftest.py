"""Names that test_preferences.py still uses, made of those that the readers have now."""

from read_rows import read_preferences

from dtrpo_ray.data.formats import preferences

preferences.FORMATS = preferences.PREFERENCE_FORMATS  # type: ignore[attr-defined]
preferences.recognise = preferences.preference_format  # type: ignore[assignment]
preferences.read_preferences = read_preferences  # type: ignore[attr-defined]
preferences.read_shard = lambda form, shard: form.read(shard)  # type: ignore[attr-defined]
preferences.shards_of = lambda form, file: form.shards(file)  # type: ignore[attr-defined]
preferences.PreferenceRow.origins = property(  # type: ignore[attr-defined]
    lambda row: [row.origin, *([row.rejected_origin] if row.rejected_origin else [])]
)
