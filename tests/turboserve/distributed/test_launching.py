"""How ranks have MLX launch kernels."""

from turboserve.cli.distributed import launch_directly


def test_ranks_launch_kernels_one_by_one_unless_told_otherwise() -> None:
    silent, told = dict[str, str](), {"MLX_USE_CUDA_GRAPHS": "1"}
    for environment in (silent, told):
        launch_directly(environment)
    assert silent == {"MLX_USE_CUDA_GRAPHS": "0"} and told == {"MLX_USE_CUDA_GRAPHS": "1"}
