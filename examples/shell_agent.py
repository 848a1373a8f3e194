"""An ordinary tool-calling agent: the OpenAI SDK, one bash tool, nothing of upspiral.

upspiral calls `agent(task)` in a warm worker process. `task` carries plain data: `instruction`, `model`, `base_url`,
`api_key`, `tools_url` and `tools_key`. The returned string is the agent's answer.
"""

import json

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

SYSTEM = "Answer the question about the files in your working directory. Use bash. Then reply with only the answer."
TOOLS: list = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run a shell command.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
            },
        },
    }
]
MAX_TURNS = 8

# One connection pool for all rollouts of this process: one per rollout would spend more time on set-up than on work.
http = DefaultAsyncHttpxClient(timeout=300)


async def agent(task) -> str:
    client = AsyncOpenAI(base_url=task.base_url, api_key=task.api_key, http_client=http)
    messages: list = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.instruction}]
    for _ in range(MAX_TURNS):
        completion = await client.chat.completions.create(model=task.model, messages=messages, tools=TOOLS)
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            assert call.type == "function"
            output = await run_tool(task, call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": output})
    return ""


async def run_tool(task, name: str, arguments: str) -> str:
    if name != "bash":
        return f"error: there is no tool {name!r}"
    headers = {"Authorization": f"Bearer {task.tools_key}"}
    response = await http.post(f"{task.tools_url}/bash", json=json.loads(arguments), headers=headers)
    if response.is_server_error:
        response.raise_for_status()
    reply = response.json()
    return reply["output"] if response.is_success else f"error: {reply['error']['message']}"
