"""Grading an agent's work in a sandbox where the agent never was, by a judge whose words nobody else can say."""

from upspiral.sandbox.grading.grade import Exam, Verdict, grade, pytest_check
from upspiral.sandbox.grading.work import Work, hand_in

__all__ = ["Exam", "Verdict", "Work", "grade", "hand_in", "pytest_check"]
