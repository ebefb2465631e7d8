"""Several worlds one after another in the same two processes, as `bit finetune --all` makes them; for test_distributed.py."""

import torch

from training.engine.distributed import RankError, join


def main() -> None:
    for number in range(3):
        try:
            with join(20) as world:
                total = world.sum(torch.tensor(world.rank + 1)).item()
                print(f"world {number} rank {world.rank} sum {total}", flush=True)
                if number == 1 and world.rank == 1:
                    raise ArithmeticError("out of paint")
                world.barrier()
        except ArithmeticError:
            pass
        except RankError as error:
            print(f"silent {error.silent}: {error}", flush=True)


if __name__ == "__main__":
    main()
