{{- define "lt.gatewayArgs" -}}
{{- $g := .Values.gateway -}}
- --host=0.0.0.0
- --port={{ int $g.port }}
- --prometheus-host=0.0.0.0
- --prometheus-port=29000
- --policy={{ $g.policy }}
- --service-discovery
- --service-discovery-namespace={{ .Release.Namespace }}
- --service-discovery-port={{ int .Values.engine.port }}
- --selector
- app.kubernetes.io/instance={{ .Release.Name }}
- app.kubernetes.io/component=engine
- lt-sglang/serves=http
# /ready turns 503 at the first moment of a drain, and costs the engine nothing.
- --health-check-endpoint=/ready
- --health-check-interval-secs=5
- --health-check-timeout-secs=5
- --health-failure-threshold=2
- --health-success-threshold=1
- --worker-startup-timeout-secs={{ mul .Values.engine.startupMinutes 60 }}
- --request-timeout-secs={{ add .Values.engine.drainSeconds 600 }}
- --shutdown-grace-period-secs={{ .Values.engine.drainSeconds }}
{{- if .Values.engine.apiKeySecret.name }}
- --api-key=$(LT_API_KEY)
{{- end }}
{{- range $g.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
