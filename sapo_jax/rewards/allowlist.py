"""Which reasoning-gym tasks may be generated and scored.

The source of every scorer of reasoning-gym 0.1.25 was read for this list. `Prompt.metadata` of such
a problem is the generator's whole entry {"question", "answer", "metadata"} as JSON values, where
metadata.metadata.source_dataset names the task. For the tasks of `NEEDS_OPTIONS` it also holds
"options", the options that the generator was made with.

These tasks are left out, for these reasons:

- The scorer hands the ANSWER to eval or to sympy's parse_expr: binary_matrix, countdown,
  intermediate_integration, n_queens, polynomial_multiplication, puzzle24, simple_integration,
  spiral_matrix, string_insertion.
- The scorer evaluates the data row, or the generator calls exec: bitwise_arithmetic,
  number_sorting, codeio.
- The scorer gives full marks to wrong answers: coin_flip ("0" for "0.5"), complex_arithmetic
  ("nan" for anything), figlet_font (ten matching letters), game_of_life_halting (any text),
  polynomial_equations (any text where there is no root).
- There is no reference answer: boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour.
- The metadata does not survive JSON: arc_agi, rearc.
- It is a mixture of others, which may hold any of these: composite.
"""

from __future__ import annotations

REASONING_GYM_TASKS: frozenset[str] = frozenset(
    """
    ab acre advanced_geometry aiw arc_1d base_conversion basic_arithmetic bf binary_alternation
    caesar_cipher calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits
    count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships fraction_simplification futoshiki game_of_life gcd group_anagrams
    gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm
    leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze
    mini_sudoku modulo_grid needle_haystack number_filtering number_format number_sequence
    palindrome_generation palindrome_partitioning path_star pool_matrix power_function
    prime_factorization products quantum_lock ransom_note rectangle_count rotate_matrix
    rotten_oranges self_reference sentence_reordering shortest_path simple_equations simple_geometry
    sokoban spell_backward string_manipulation string_splitting string_synthesis sudoku survo
    syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting
    zebra_puzzles
    """.split()
)

# The scorers of these tasks read the generator's own options (the tolerance; the vocabulary), which
# the metadata does not hold.
NEEDS_OPTIONS: frozenset[str] = frozenset({"decimal_arithmetic", "word_ladder"})
