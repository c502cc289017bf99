"""`python -m dtrpo_ray` is the `dtrpo` command."""

from dtrpo_ray.cli import main

if __name__ == "__main__":
    main()
