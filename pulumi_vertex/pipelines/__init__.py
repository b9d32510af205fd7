"""`PipelineJob` and `Schedule`.

pipeline_job.py has a pipeline that runs once, schedule.py one that runs again and again; schedule_message.py has the
inputs of the latter and Vertex AI's message. specification.py has the inputs that both share, template.py reads and
checks compiled pipelines, cron.py the times of a schedule.
"""

from .pipeline_job import PipelineJob, PipelineJobType, Task
from .schedule import Schedule, ScheduleType

__all__ = ["PipelineJob", "PipelineJobType", "Schedule", "ScheduleType", "Task"]
