"""A graph of LangGraph: a model node and a tool node with one tool, a shell."""

# pyright: reportMissingImports=false

import os
import subprocess
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


@tool
def shell(command: str) -> str:
    """Run a shell command and return what it printed."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr or f"exit code {done.returncode}"


model = ChatOpenAI(model=os.environ["OPENAI_MODEL"]).bind_tools([shell])


def ask(state: MessagesState) -> dict:
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("model", ask)
graph.add_node("tools", ToolNode([shell]))
graph.add_edge(START, "model")
graph.add_conditional_edges("model", tools_condition)
graph.add_edge("tools", "model")

state = graph.compile().invoke(
    {"messages": [("system", "You work with files through a shell."), ("user", sys.stdin.read())]},
    {"recursion_limit": 100},
)
print(state["messages"][-1].text)
