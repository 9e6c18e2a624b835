{{- define "lt.labels" -}}
app.kubernetes.io/name: lt-sglang
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: monitoring
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
