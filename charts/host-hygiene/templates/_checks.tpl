{{/* Values that contradict each other, in words that say what to do. */}}
{{- define "host-hygiene.checks" -}}
{{- if and .Values.namespace.create (eq .Release.Namespace "host-hygiene") }}
{{- fail "this chart makes the namespace host-hygiene, so its release can not be kept there: install it with --namespace kube-system, say, or make the namespace with its pod-security labels yourself and set namespace.create=false" }}
{{- end }}
{{- if and .Values.observe .Values.remedies.allow }}
{{- fail "observe and remedies.allow contradict each other: an agent that only observes repairs nothing" }}
{{- end }}
{{- if and .Values.observe .Values.nfd }}
{{- fail "observe and nfd contradict each other: an agent that only observes has no folder of the host to write features into" }}
{{- end }}
{{- if and .Values.prometheusOperator (eq .Values.metrics.mode "loopback") }}
{{- fail "prometheusOperator and metrics.mode=loopback contradict each other: Prometheus could not reach the agents" }}
{{- end }}
{{- with .Values.config }}
{{- $config := fromYaml . }}
{{- if hasKey $config "Error" }}
{{- fail (printf "config: %s" $config.Error) }}
{{- end }}
{{- if ne (get $config "kind" | toString) "AgentConfig" }}
{{- fail "config: give the text of the agent's config file, with kind: AgentConfig; agent validate says what else is wrong with it" }}
{{- end }}
{{- end }}
{{- end }}
