"""Training by group-relative policy optimisation (GRPO).

A step draws a group of completions of each prompt (`rollouts`), scores them (`rewards`), compares them within their
group (`advantages`), and moves the policy towards the better ones (`losses`, `step`). New weights are pushed to the
engines that draw, and a canary proves that they arrived (`sync`). All of it is plain code on tensors; only `actors`,
`train_loop` and `vllm_*` know the machinery.
"""
